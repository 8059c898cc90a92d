"""The finetuning jobs in an engine's hands: planned on their way in, their memory reserved until they leave."""

from __future__ import annotations

from collections.abc import Mapping

from services.gpu_worker.engine.admission import Admission
from services.gpu_worker.engine.model_runner import ModelRunner
from services.gpu_worker.finetune.checkpoint import load_checkpoint, save_checkpoint
from services.gpu_worker.finetune.dataset import Dataset
from services.gpu_worker.finetune.job import FinetuneJob, JobConfig
from services.gpu_worker.finetune.trainer import Trainer, examples_of
from services.gpu_worker.model.peft import LoraConfig, Method, num_virtual_tokens, trains_head
from services.gpu_worker.model.peft_files import write_peft


class Jobs:
    def __init__(self, runner: ModelRunner, admission: Admission, most: int, max_lora_rank: int) -> None:
        self._runner, self._admission = runner, admission
        self._most, self._max_lora_rank = most, max_lora_rank
        self._jobs: dict[str, FinetuneJob] = {}

    def can_add(self) -> bool:
        return len(self._jobs) < self._most and not self._admission.is_full

    def add(
        self,
        job_id: str,
        config: JobConfig,
        method: Method,
        training: Dataset,
        validation: Dataset | None,
        tenant: str,
        weight: float,
        checkpoint: Mapping[str, bytes] | None,
    ) -> FinetuneJob:
        """As `Engine.add_job`."""
        if isinstance(method, LoraConfig) and method.rank > self._max_lora_rank:
            raise ValueError(f"rank {method.rank} exceeds {self._max_lora_rank}")
        model, admission = self._runner.model, self._admission
        lengths = examples_of(training, method)
        held_out = examples_of(validation, method) if validation else None
        plan = admission.find_plan(method, config, lengths, held_out)
        job = FinetuneJob(
            job_id,
            config,
            lengths,
            held_out,
            model.config.num_layers,
            plan.max_tokens,
            admission.grain,
            weight,
            trains_layers=plan.policies.compiled.trains_layers,
            trains_head=trains_head(method),
            can_park=plan.can_park,
            tenant=tenant,
        )
        longest = model.max_position - num_virtual_tokens(method)
        for dataset in filter(None, (training, validation)):
            dataset.check(model.config.vocab_size, longest)
        trainer = Trainer(
            model,
            self._runner.cache,
            job,
            training,
            validation,
            plan.policies,
            plan.num_host_layers,
            admission.num_lanes,
        )
        job.num_update_parts = trainer.parameters.num_parts
        if checkpoint is not None:
            load_checkpoint(trainer, checkpoint)
        admission.reserve(job_id, plan)
        self._runner.trainers[job_id] = trainer
        self._jobs[job_id] = job
        return job

    def find(self, job_id: str) -> FinetuneJob | None:
        return self._jobs.get(job_id)

    def get(self, job_id: str) -> FinetuneJob:
        return self._jobs[job_id]

    def all(self) -> dict[str, FinetuneJob]:
        """Those of now, by their ids."""
        return dict(self._jobs)

    def release(self, job_id: str) -> None:
        del self._jobs[job_id]
        del self._runner.trainers[job_id]
        self._admission.release(job_id)

    def checkpoint(self, job_id: str) -> dict[str, bytes]:
        """The state between two optimizer steps, as files."""
        return save_checkpoint(self._runner.trainers[job_id])

    def export(self, job_id: str, base_model: str) -> dict[str, bytes]:
        """The adapter between two optimizer steps, as PEFT's two files."""
        parameters = self._runner.trainers[job_id].parameters
        whole = self._runner.model.weights.whole
        return write_peft(whole, parameters.weights.method, base_model, parameters.whole_masters())
