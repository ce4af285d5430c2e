"""Costs of jobs: memory as torch allocates it, arithmetic, and the requests that follow."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from snakemake_executor_plugin_slurm.partitions import PartitionLimits
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PretrainedConfig

from forgetting.config.expand import Method, expand_methods
from forgetting.config.methods import Hyperparameters
from forgetting.config.study import StudyConfig
from forgetting.errors import InputError
from forgetting.models.adapters import attach_adapter, cast_frozen_weights
from forgetting.models.loading import Model
from forgetting.models.size import size_from_config
from forgetting.pipeline.resources.hardware import (
    GPUS,
    LIMITS,
    Device,
    Site,
    core_device,
    find_device,
    read_site,
)
from forgetting.pipeline.resources.job_costs import ON_DEVICES, SUBMITTED, JobCosts
from forgetting.pipeline.resources.memory import (
    activation_bytes,
    checkpoint_bytes,
    trained_state_bytes,
    training_bytes,
)
from forgetting.pipeline.resources.requests import Resources, resource_requests
from forgetting.pipeline.resources.runtime import generation_seconds, step_seconds
from forgetting.pipeline.resources.workload import ProcessCount, Workload
from forgetting.study.load import load_study
from forgetting.training.batched_lora import trained_weights
from forgetting.training.checkpoints import TrainState, save_checkpoint
from forgetting.training.optimizer import make_optimizer

STUDIES = Path(__file__).resolve().parents[3] / "config" / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=320, tie_word_embeddings=False,
)  # fmt: skip
FULL = Method(
    name="full", kind="full", label="full", hyperparameters=[Hyperparameters(learning_rate=1e-3)]
)
LORA = Method(
    name="lora-r8", kind="lora", label="rank 8", rank=8, alpha=8.0,
    hyperparameters=[Hyperparameters(learning_rate=1e-3)],
)  # fmt: skip


def _study(name: str = "tofu-phi-1.5", **changes: Any) -> StudyConfig:
    study = load_study({"study": name}, STUDIES)[1]
    training = study.training.model_copy(update=changes)
    return study.model_copy(update={"training": training})


class _OfConfig(Workload):
    """The workload of a study with a model that is small enough to build."""

    config: PretrainedConfig = CONFIG

    @property
    def model_size(self) -> Any:
        """Return the size of the model."""
        return size_from_config(self.config.to_dict())


def _case(device: Device, config: PretrainedConfig = CONFIG, **changes: Any) -> Workload:
    case = _OfConfig(_study(**changes), device)
    object.__setattr__(case, "config", config)
    return case


def _bytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _stepped(tuning: Method, optimizer: str) -> tuple[Model, torch.optim.Optimizer]:
    """Return model and optimizer after a step, with gradients and the optimizer's state."""
    study = _study(optimizer=optimizer)
    model = attach_adapter(AutoModelForCausalLM.from_config(CONFIG), tuning, seed=0)
    stepped = make_optimizer(trained_weights(model), study.training, tuning.hyperparameters[0])
    model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    stepped.step()
    return model, stepped


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "lionw"])
def test_training_state_has_the_size_that_torch_allocates(
    tuning: Method, optimizer: str, tmp_path: Path
) -> None:
    """A trained weight takes 16 bytes with AdamW and 12 with Lion, also in a checkpoint."""
    model, stepped = _stepped(tuning, optimizer)
    weights = list(model.parameters())
    state = [v for s in stepped.state.values() for v in s.values() if torch.is_tensor(v)]
    moments = [tensor for tensor in state if tensor.ndim]
    held = _bytes(weights) + _bytes(w.grad for w in weights if w.grad is not None)
    case = _case(core_device(1), optimizer=optimizer)
    expected = trained_state_bytes(case, tuning, ProcessCount())
    assert expected == held + _bytes(moments)
    save_checkpoint(model, stepped, TrainState(step=1), tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert checkpoint_bytes(case, tuning) == pytest.approx(written, rel=0.1)


def test_frozen_matrices_under_an_adapter_are_bfloat16() -> None:
    model = attach_adapter(AutoModelForCausalLM.from_config(CONFIG), LORA, seed=0)
    cast_frozen_weights(model, torch.bfloat16)
    held = _bytes(model.parameters()) + _bytes(
        tensor for w in trained_weights(model).values() for tensor in (w, w, w)
    )
    assert trained_state_bytes(_case(GPUS["H100"]), LORA, ProcessCount()) == held


WIDE = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 320}
MODELS = {
    "llama": LlamaConfig(intermediate_size=688, num_key_value_heads=8, **WIDE),
    "grouped": LlamaConfig(intermediate_size=1024, num_key_value_heads=2, **WIDE),
    "phi": PhiConfig(intermediate_size=1024, **WIDE),
}


@pytest.mark.parametrize("half", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dropout", [None, 0.0, 0.05], ids=["full", "lora", "dropout"])
@pytest.mark.parametrize("name", MODELS)
def test_activation_bytes_are_near_those_of_the_graph(
    name: str, dropout: float | None, half: bool
) -> None:
    """The estimate is 1 to 1.5 times the bytes of a further block, which hooks measure."""
    config = MODELS[name]
    tuning = FULL if dropout is None else LORA.model_copy(update={"dropout": dropout})
    kept = (_kept(config, 3, tuning, half) - _kept(config, 1, tuning, half)) / 2
    device = GPUS["H100"] if half else core_device(1)
    estimate = activation_bytes(_case(device, config), tuning)
    assert kept <= estimate <= 1.5 * kept


def _kept(config: PretrainedConfig, blocks: int, tuning: Method, half: bool) -> float:
    """Return the bytes per token that a forward pass keeps, without weights and their copies."""
    config.num_hidden_layers = blocks
    model = attach_adapter(AutoModelForCausalLM.from_config(config), tuning, seed=0).train()
    cast_frozen_weights(model, torch.bfloat16 if half else torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            held[place] = tensor
        return tensor

    rows, length = 4, 64
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    trained = [w for n, w in model.named_parameters() if w.ndim == 2 and ".layers." in n]
    copies = 2 * sum(w.numel() for w in trained if w.requires_grad) if half else 0
    return (_bytes(held.values()) - copies) / (rows * length)


def test_step_takes_its_arithmetic_or_its_kernel_launches() -> None:
    """Large steps take 6 N FLOPs a token at 40 % of the peak, small ones 24 blocks of launches."""
    device = GPUS["H100"]
    large = Workload(_study("biderman-math-cpt"), device)
    full = large.model_size.training(FULL, 4096.0, 1.0, True) * 192 * 4096 / 32
    seconds = step_seconds(large, FULL, ProcessCount(32, 4))
    assert seconds == pytest.approx(full / (0.4 * 989e12), rel=0.05)
    small = Workload(_study("tofu-phi-1.5", batch_size=1, micro_batch_size=1), device)
    update = 44 * small.model_size.parameters / device.bandwidth
    assert step_seconds(small, FULL, ProcessCount()) == pytest.approx(24 * 1.7e-3 + update)


def test_time_falls_with_processes_and_rises_with_tokens() -> None:
    case = Workload(_study("biderman-math-cpt"), GPUS["H100"])
    for tuning in (FULL, LORA):
        times = [step_seconds(case, tuning, ProcessCount(n)) for n in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True)
    few, many = (generation_seconds(case, n, 128, 40.0, 100.0) for n in (128, 256))
    assert many == pytest.approx(2 * few)


def test_full_fine_tuning_of_7b_gets_enough_gpus() -> None:
    """It gets four GPUs of 80 GB, two of 141 GB or eight of 48 GB; an adapter gets one."""
    for device, processes in {"H100": 4, "A100": 4, "H200": 2, "L40S": 8}.items():
        site = Site.model_validate({"machines": {"device": device}})
        costs = JobCosts(_study("tofu-llama-2-7b"), site)
        assert costs.process_count("full").processes == processes
        for name, tuning in costs.methods.items():
            if tuning.kind == "lora":
                assert costs.process_count(name) == ProcessCount()
            # The trained weights of rank 512 take 20 GB in addition to the base.
            if (device, name) != ("L40S", "lora-r512"):
                used = training_bytes(costs.workload, tuning, costs.process_count(name))
                assert used <= costs.workload.device.usable


def test_second_attempt_of_a_sharded_run_has_more_gpus() -> None:
    """More GPUs are the only remedy for too little GPU memory. A number in the study is kept."""
    site, requests = Site(), {}
    for processes in (None, 4):
        study = _study("tofu-llama-2-7b")
        methods = [m.model_copy(update={"processes": processes}) for m in study.methods]
        costs = JobCosts(study.model_copy(update={"methods": methods}), site)
        cost = costs.of("finetune", {"method": "full"})
        requests[processes] = [
            resource_requests("finetune", cost, site, attempt) for attempt in (1, 2, 3)
        ]
    assert [each["gpu"] for each in requests[None]] == [4, 8, 8]
    assert [each["gpu"] for each in requests[4]] == [4, 4, 4]
    assert [each["cpus_per_task"] for each in requests[None]] == [32, 64, 64]
    assert requests[None][1]["mem_mb"] == pytest.approx(3 * requests[None][0]["mem_mb"], abs=3)


def test_training_on_20b_tokens_spans_machines() -> None:
    site = Site()
    costs = JobCosts(_study("biderman-math-cpt"), site)
    for name in costs.methods:
        assert costs.process_count(name).nodes > 1
        assert costs.of("finetune", {"method": name}).seconds <= 60 * site.longest / 1.5
    weeks = JobCosts(_study("biderman-math-cpt"), Site(longest=60 * 24 * 60))
    assert {weeks.process_count(name).nodes for name in weeks.methods} == {1}


def test_processes_of_the_study_are_kept() -> None:
    study = _study("mini")
    method = study.methods[-1].model_copy(update={"processes": 6, "nodes": 3})
    costs = JobCosts(study.model_copy(update={"methods": [method]}), Site())
    assert costs.process_count("full") == ProcessCount(6, 3)


@pytest.mark.parametrize("study", NAMES)
def test_attempts_request_more_within_the_limits_of_the_site(study: str) -> None:
    """Memory and time grow up to the limits of the site, from at least 8 GB."""
    costs = JobCosts(_study(study), Site())
    for rule in SUBMITTED:
        if rule == "pretrain_base" and not costs.study.base.pretrain:
            continue
        method = next(iter(costs.methods))
        duration = next(iter(costs.durations), "")
        cost = costs.of(
            rule, {"method": method, "duration": duration if rule == "train_cooldown" else ""}
        )
        attempts = [resource_requests(rule, cost, costs.site, attempt) for attempt in (1, 2, 3, 9)]
        for name, limit in {"mem_mb": costs.site.largest, "runtime": costs.site.longest}.items():
            values = [each[name] for each in attempts]
            assert values == sorted(values)
            assert values[-1] <= limit
            assert values[1] > values[0] or values[0] == limit
        assert attempts[0]["mem_mb"] >= (8000 if rule in ON_DEVICES else 4000)
        assert set(Resources(costs).of(rule)) - {"mpi"} == set(attempts[0])


def test_invalid_device_or_site_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device: H300 is not known; give one of H100"):
        find_device("H300", 1)
    site = tmp_path / "site.yaml"
    for text, message in {
        "machines: {device: H300}": "machines.device: H300 is not known",
        "machines: {gpu: 8}": "machines.gpu: Extra inputs are not permitted",
        "partitions: {gpu: {max_runtime: soon}}": "max_runtime: soon; give minutes",
        "partitions: {gpu: {max_mem_mb: -1}}": "max_gpu or max_mem_mb: -1; give a whole number",
        "machine: {device: A100}": "`machine` is not known",
        "partitions: {gpu: {max_time: 1d}}": "partitions.gpu: `max_time` is not known; a limit is",
        "[": "not a file of a site",
    }.items():
        site.write_text(text)
        with pytest.raises(InputError) as error:
            read_site(site)
        assert str(error.value).startswith(f"{site}: ")
        assert message in str(error.value)
    site.write_text("partitions: {a: {max_runtime: 2d}, b: {max_runtime: 90}}\n")
    assert read_site(site).longest == 2880


def test_partition_limits_equal_those_of_the_slurm_plugin() -> None:
    names = {field.name for field in dataclasses.fields(PartitionLimits)}
    assert {"slurm_cluster", "cluster", "clusters"} | names == LIMITS


def test_forecast_batches_the_runs_that_training_batches() -> None:
    """Eight runs of Phi share a pass, and two runs of `mini` are trained one after the other."""
    for name, passes in {"tofu-phi-1.5": [8], "mini": [1, 1]}.items():
        case = Workload(_study(name), GPUS["H100"])
        assert case.runs_per_pass(expand_methods(case.study)[0], ProcessCount()) == passes


ROWS: dict[str, dict[str, Any]] = {
    "pairs": {"question": "Who?", "answer": "I.", "perturbed_answer": ["You.", "She."]},
    "messages": {"messages": [{"role": "user", "content": "Who?"},
                              {"role": "assistant", "content": "I."}]},
    "text": {"text": "A short text."},
}  # fmt: skip
LORA_METHOD = {"method": "lora", "rank": 2, "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "conversations": {"train": "own/messages"},
    "texts": {"train": "own/text", "training": {"max_length": 16}},
    "packed": {"training": {"packing": True, "max_length": 32}},
    "recomputed": {"training": {"activation_checkpointing": True, "optimizer": "adafactor"}},
    "one row": {"train_limit": 1, "training": {"batch_size": 64}},
    "durations": {"training": {"schedule": "wsd", "epochs": 8, "durations": [0.5, 8]}},
    "variants": {
        "methods": [
            LORA_METHOD | {"variant": variant} for variant in ("dora", "pissa", "adalora", "rslora")
        ]
    },
    "hybrid": {
        "methods": [
            {"method": "hybrid", "rank": 2, "learning_rate": 1e-3,
             "second_stage": {"layers": layers, "learning_rate": 1e-4, "suffix": name}}
            for name, layers in {"all": "all", "last": "last 1", "some": ["mlp"]}.items()
        ]
    },
    "mitigations": {
        "methods": [
            method | {"mitigation": mitigation}
            for method in (LORA_METHOD, {"method": "full", "learning_rate": 1e-3})
            for mitigation in (
                {"replay": {"table": "own/text", "ratio": 0.2}},
                {"kl": {"weight": 0.1}},
                {"ewc": {"weight": 0.1, "table": "own/text"}},
                {"l2_sp": {"weight": 0.1}},
            )
        ]
    },
    "shares": {"selection": {"probe": "new", "wise_ft": [0.5]}},
    "text": {"general_text": {"table": "own/text", "block": 8}},
    "refusals": {"benchmarks": {"refusals": {"table": "own/pairs"},
                             "tasks": {"humaneval": {"samples": 20}}}},
}  # fmt: skip


def test_jobs_with_gpus_fit_partitions_with_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest partition may have no GPUs, and one job may not have all GPUs."""
    path = tmp_path / "site.yaml"
    path.write_text(
        "partitions:\n"
        "  gpu: {max_runtime: 1d, max_gpu: 8, max_mem_mb: 400000}\n"
        "  cpu: {max_runtime: 7d, max_mem_mb: 900000}\n"
        "machines: {device: A100, count: 4, gpus: 8, cpus: 64, memory_gb: 1000}\n"
    )
    monkeypatch.delenv("SNAKEMAKE_SLURM_PARTITIONS", raising=False)
    site = read_site(path)
    costs = JobCosts(_study("biderman-math-cpt"), site)
    for name in costs.methods:
        assert costs.process_count(name).processes <= 8
        requests = resource_requests(
            "finetune", costs.of("finetune", {"method": name}), site, attempt=3
        )
        assert requests["runtime"] <= 1440
        assert requests["gpu"] <= 8
        assert requests["mem_mb"] <= 400_000
    assert site.longest_light == 7 * 1440
    path.write_text(path.read_text().replace("max_runtime: 1d", "max_runtime: 0"))
    with pytest.raises(InputError, match="max_runtime: 0"):
        read_site(path)


@pytest.mark.parametrize("device", ["H100", "CPU"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_study_has_costs(
    variant: str, device: str, tmp_path: Path, base_folder: Path
) -> None:
    """Every job of every valid study has positive costs within the limits of the site."""
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    document = {
        "title": variant,
        "datasets": {"own": {"folder": str(tmp_path)}},
        "base": {"model": str(base_folder)},
        "train": "own/pairs",
        "probes": {"new": {"table": "own/pairs", "knowledge": "new", "truth_ratio": False}},
        "methods": [LORA_METHOD, {"method": "full", "learning_rate": 1e-3}],
        "selection": {"probe": "new"},
    } | VARIANTS[variant]
    study = StudyConfig.model_validate(document)
    costs = JobCosts(study, Site.model_validate({"machines": {"device": device}}))
    kinds = [("evaluate_base", {}), ("benchmark_base", {}), ("evaluate_wise_ft", {})]
    kinds += [("run_programs", {"model": "base"}), ("make_tables", {})]
    for method in costs.methods:
        kinds += [(rule, {"method": method}) for rule in ("finetune", "benchmark")]
        kinds += [
            ("train_cooldown", {"method": method, "duration": name}) for name in costs.durations
        ]
    for rule, wildcards in kinds:
        cost = costs.of(rule, wildcards)
        assert cost.stages
        assert all(0 <= seconds < 1e5 for seconds in cost.stages.values())
        assert cost.processes == ProcessCount()
        assert 0 <= cost.device_bytes < costs.workload.device.usable
        for value in resource_requests(rule, cost, costs.site).values():
            assert math.isfinite(value)
            assert value >= 0


def test_model_with_unknown_config_keys_gets_a_guess(tmp_path: Path) -> None:
    """A configuration with unknown keys does not prevent the plan."""
    shape = size_from_config({"model_type": "odd", "d_model": 64, "n_heads": 4, "vocab_size": 300})
    assert not shape.is_exact
    nested = size_from_config({"model_type": "vision", "text_config": CONFIG.to_dict()})
    assert nested.is_exact
    assert nested.blocks == 2


def test_site_without_gpus_gets_no_gpu_requests() -> None:
    """A job has one process on the CPU; the launcher treats 0 GPUs as one process."""
    site = Site.model_validate({"machines": {"device": "CPU", "gpus": 2, "cpus": 8}})
    costs = JobCosts(_study("mini"), site)
    for rule in ON_DEVICES[:3]:
        requests = resource_requests(rule, costs.of(rule, {"method": "full"}), site)
        assert (requests["gpu"], requests["cpus_per_task"]) == (0, 4)
