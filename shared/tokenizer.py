"""Text to token ids and back, as the model was trained: its tokenizer, its chat template, its control tokens.

Control tokens come from the template alone. The text of one inside a message is encoded as plain text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from shared.chat_template import ChatTemplate, ChatTemplateError, Message, canonical, map_texts, texts_in
from shared.detokenizer import IncrementalDetokenizer, TokenBytes
from shared.model_folder import read_chat_template, read_json

__all__ = ["ChatTemplateError", "ChatTokenizer"]

PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning, to mark places in texts


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in which the texts of control tokens are broken by `mark`. Neither mark occurs otherwise."""

    messages: list[Message]
    tools: list[Message] | None
    mark: str
    other_mark: str


class ChatTokenizer:
    """Thread safe. Raises ModelFolderError where the folder has no usable tokenizer."""

    def __init__(self, model_dir: Path) -> None:
        path = str(model_dir / "tokenizer.json")
        self._control = Tokenizer.from_file(path)
        self._plain = Tokenizer.from_file(path)
        self._plain.encode_special_tokens = True
        for tokenizer in (self._control, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._bytes = TokenBytes(self._control)
        added = self._control.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        self._special = pattern_of(self._special_ids)
        special_texts = read_special_texts(model_dir)
        source = read_chat_template(model_dir)
        self._template = ChatTemplate(source, special_texts) if source else None
        self.eos_token_ids = read_eos_token_ids(model_dir)
        own_eos = self._control.token_to_id(special_texts.get("eos_token", ""))
        self.eos_token_id = own_eos if own_eos is not None else self.eos_token_ids[0]
        ends = {*self.eos_token_ids, self.eos_token_id}
        end_texts = pattern_of(text for text, i in self._special_ids.items() if i in ends)
        self._end_of_turn = re.compile(rf"\s?(?:{end_texts.pattern})")
        self.vocab_size = read_vocab_size(model_dir) or self._control.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Plain text only: no control token, none added."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """A raw prompt, as its author wrote it: control tokens count, and the model's own first ones are added."""
        return list(self._control.encode(text).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Without control tokens."""
        return str(self._control.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text; several tokens may share one character."""
        return self._bytes[token_id]

    def detokenizer(self, prompt: Sequence[int] = ()) -> IncrementalDetokenizer:
        """For the text that continues `prompt`."""
        return IncrementalDetokenizer(self._control, prompt)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError("the model has no chat template; use completions")
        canonical_messages = [canonical(message) for message in messages]
        return self._template.render(canonical_messages, tools, add_generation_prompt)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Raises ChatTemplateError."""
        conversation = self._disarm(messages, tools)
        rendered = self.render_chat(conversation.messages, conversation.tools, add_generation_prompt)
        return self._encode_rendered(rendered, conversation.mark)[0]

    def encode_training(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None
    ) -> tuple[list[int], list[int]]:
        """Tokens and mask: 1 for each token of an assistant's message (its end included) to learn from.

        A message with `weight` 0 is context only. Raises ChatTemplateError.
        """
        conversation = self._disarm(messages, tools)
        rendered = self.render_chat(conversation.messages, conversation.tools, add_generation_prompt=False)
        tokens, starts = self._encode_rendered(rendered, conversation.mark)
        mask = [0] * len(tokens)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight") != 0:
                start, end = self._span(conversation, i, rendered)
                first, last = bisect_left(starts, start), bisect_left(starts, end)
                mask[first:last] = [1] * (last - first)
        return tokens, mask

    def _span(self, conversation: Conversation, index: int, rendered: str) -> tuple[int, int]:
        """Where the text of one message stands: what changes when the message does, and the end of turn."""
        changed = [*conversation.messages]
        changed[index] = {"role": changed[index]["role"], "content": conversation.other_mark}
        other = self.render_chat(changed, conversation.tools, add_generation_prompt=False)
        if conversation.other_mark not in other:
            raise ChatTemplateError(f"the chat template leaves message {index + 1} out")
        start = common_prefix(rendered, other)
        end = len(rendered) - common_prefix(rendered[start:][::-1], other[start:][::-1])
        closing = self._end_of_turn.match(rendered, end)
        end = closing.end() if closing else end
        mark = conversation.mark
        return start - rendered.count(mark, 0, start), end - rendered.count(mark, 0, end)

    def _disarm(self, messages: Sequence[Message], tools: Sequence[Message] | None) -> Conversation:
        used = {char for text in texts_in([*messages, *(tools or ())]) for char in text}
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        mark, other_mark = next(free), next(free)

        def disarmed(text: str) -> str:
            return self._special.sub(lambda found: found[0][0] + mark + found[0][1:], text)

        own_tools = map_texts(list(tools), disarmed) if tools else None
        return Conversation(map_texts(list(messages), disarmed), own_tools, mark, other_mark)

    def _encode_rendered(self, text: str, mark: str) -> tuple[list[int], list[int]]:
        """Token ids, and where in the text without marks each token starts."""
        if mark not in text:
            encoding = self._control.encode(text, add_special_tokens=False)
            return list(encoding.ids), [start for start, _ in encoding.offsets]
        tokens: list[int] = []
        starts: list[int] = []
        base = 0
        for i, piece in enumerate(re.split(f"({self._special.pattern})", text)):
            if i % 2:  # what the pattern matched: a control token of the template
                tokens.append(self._special_ids[piece])
                starts.append(base)
            else:
                piece = piece.replace(mark, "")
                encoding = self._plain.encode(piece, add_special_tokens=False)
                tokens += encoding.ids
                starts += [base + start for start, _ in encoding.offsets]
            base += len(piece)
        return tokens, starts


def pattern_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first."""
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def common_prefix(a: str, b: str) -> int:
    """Length of what the two texts begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def read_special_texts(model_dir: Path) -> dict[str, str]:
    """bos_token, eos_token ... of tokenizer_config.json; an entry is a string or an object with `content`."""
    path = model_dir / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    texts = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def read_eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Of the generation configuration, else of the model's."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return (0,)


def read_vocab_size(model_dir: Path) -> int | None:
    """Rows of the embedding; the tokenizer may know fewer."""
    path = model_dir / "config.json"
    size = read_json(path).get("vocab_size") if path.is_file() else None
    return int(size) if size is not None else None
