"""An operator without a browser: signs in, reads pages, sends their forms."""

from __future__ import annotations

import html
import re

import httpx

PASSWORD = "password-of-the-tests"
TOKEN = re.compile(r'name="csrf_token" value="(\w+)"')
FLASH = re.compile(r'<div class="banner banner-(ok|error)" role="status">.*?<span>(.*?)</span>', re.DOTALL)


class Operator:
    """Follows no redirect by itself."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.token = ""

    async def sign_in(self, password: str = PASSWORD, **fields: str) -> httpx.Response:
        await self.read_token("/login")
        answer = await self.post("/login", password=password, **fields)
        if answer.status_code == 303:
            await self.read_token("/tenants")
        return answer

    async def read_token(self, path: str) -> None:
        found = TOKEN.search((await self.get(path)).text)
        assert found is not None
        self.token = found[1]

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(f"/admin{path}", headers=headers)

    async def read(self, path: str) -> str:
        """A page that must be there, as text."""
        answer = await self.get(path)
        assert answer.status_code == 200, (path, answer.status_code)
        return answer.text

    async def post(
        self, path: str, *, came_from: str = "/", token: str | None = None, **fields: str | int | list[str]
    ) -> httpx.Response:
        data = {"csrf_token": self.token if token is None else token, **fields}
        headers = {"referer": f"http://store/admin{came_from}"}
        return await self.client.post(f"/admin{path}", data=data, headers=headers)

    async def change(self, path: str, **fields: str | int | list[str]) -> tuple[str, str]:
        """Sends a form and follows its redirect: (ok or error, what the next page says)."""
        answer = await self.post(path, **fields)
        assert answer.status_code == 303, answer.text
        page = await self.client.get(answer.headers["location"])
        found = FLASH.search(page.text)
        assert found is not None, page.text
        return found[1], html.unescape(found[2])
