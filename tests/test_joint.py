"""Which methods and seeds one job trains, and what it is told and forecast to cost."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config

from forgetting.costs.calibrate import compare
from forgetting.costs.case import Case, Team
from forgetting.costs.cost import Costs
from forgetting.costs.durations import step_seconds
from forgetting.costs.footprint import (
    finished_bytes,
    going_bytes,
    trained_state,
    training_bytes,
)
from forgetting.costs.hardware import GPUS, cores
from forgetting.costs.joint import cohort_names, joint_cohorts
from forgetting.costs.site import Site
from forgetting.costs.sizing import misfits
from forgetting.records import write_table
from forgetting.results.collect import in_order
from forgetting.settings.plan import tunings
from forgetting.settings.study import Study
from forgetting.training.cohort import cohort_items
from forgetting.training.fusible import can_fuse, outline

ROOT = Path(__file__).resolve().parents[1]
LORA = {"method": "lora", "learning_rate": [1e-3]}
PHI = {"model": "microsoft/phi-1_5", "revision": "0" * 40}
SITE = Site.model_validate({"machines": {"device": "H100"}})


def _study(
    methods: list[dict[str, Any]], fused: str = "across", seeds: int = 2, **training: Any
) -> Study:
    return Study.model_validate(
        {
            "title": "several ranks",
            "datasets": {"world": {"generate": "micro-world"}},
            "base": PHI,
            "train": "world/new_authors",
            "probes": {"new": {"table": "world/new_authors", "knowledge": "new"}},
            "methods": methods,
            "training": {"fused": fused, **training},
            "selection": {"probe": "new"},
            "seeds": list(range(seeds)),
        }
    )


def _cohorts(study: Study) -> list[list[str]]:
    """Members of each job that has several, as `lora-r2/0`."""
    joint = joint_cohorts(study).values()
    return [[f"{tuning.name}/{seed}" for tuning, seed in members] for members in joint]


@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({}, None),
        ({"variant": "rslora"}, None),
        # What follows shares no pass with the others: another base, other matrices or losses.
        ({"variant": "pissa"}, []),
        ({"variant": "dora"}, []),
        ({"processes": 2}, []),
        ({"mitigation": {"l2_sp": {"weight": 0.1}}}, []),
        ({"target_modules": "mlp"}, [["lora-r8-mlp/0", "lora-r8-mlp/1"]]),
        # With dropout, the mask is that of one seed.
        ({"dropout": 0.1}, [["lora-r8/0"], ["lora-r8/1"]]),
    ],
)
def test_which_methods_and_seeds_are_one_cohort(
    changes: dict[str, Any], apart: list[list[str]] | None
) -> None:
    """Those that may share a pass, and no others; every method and seed is in one cohort."""
    rates = [1e-3, 2e-3, 3e-3, 4e-3]
    study = _study([LORA | {"rank": 2, "learning_rate": rates[:2]},
                    LORA | {"rank": 8, "learning_rate": rates} | changes])  # fmt: skip
    low, high = ([f"{tuning.name}/{seed}" for seed in (0, 1)] for tuning in tunings(study))
    found = _cohorts(study)
    expected = [low + high] if apart is None else [low, *(part for part in apart if len(part) > 1)]
    assert found == expected
    names = cohort_names(study, joint_cohorts(study))
    assert len(names) == 4
    assert {name for name in names.values() if name.startswith("together")} == set(
        joint_cohorts(study)
    )
    alone = {f"{m}/{s}" for (m, s), name in names.items() if name == f"{m}/seed{s}"}
    assert alone == {*low, *high}.difference(chain(*found))


def test_ranks_with_dropout_are_one_cohort_for_each_seed() -> None:
    study = _study([LORA | {"rank": [2, 4, 8, 16], "dropout": 0.1}])
    seeds = [{seed for _, seed in members} for members in joint_cohorts(study).values()]
    assert seeds == [{0}, {1}]


@pytest.mark.parametrize("fused", ["auto", "never"])
def test_by_default_every_method_and_seed_is_a_cohort(fused: str) -> None:
    assert _cohorts(_study([LORA | {"rank": [2, 8]}], fused)) == []


@pytest.mark.parametrize(
    ("changes", "seeds"),
    [
        ({}, 1),
        ({"micro_batch_size": 3}, 2),
        ({"batch_size": 512, "micro_batch_size": 8}, 2),
    ],
)
def test_what_could_share_no_pass_anywhere_is_not_one_job(
    changes: dict[str, Any], seeds: int
) -> None:
    """Fewer than four runs, fewer rows of a pass than that, or steps that are large by themselves:
    jobs side by side end sooner.
    """
    assert _cohorts(_study([LORA | {"rank": [2, 8]}], "across", seeds, **changes)) == []
    assert _cohorts(_study([LORA | {"rank": [2, 8]}], "across", 2, micro_batch_size=8))


def test_a_base_whose_rows_are_not_apart_has_no_joint_jobs() -> None:
    """GPT-2's layers are no plain linear ones, and its dropout is drawn for all rows of a pass."""
    study = _study([LORA | {"rank": [2, 8]}])
    base = study.base.model_copy(update={"model": "openai-community/gpt2"})
    assert _cohorts(study)
    assert _cohorts(study.model_copy(update={"base": base})) == []


def test_a_job_holds_no_more_runs_than_a_pass() -> None:
    """Jobs run side by side, and the passes of one job do not."""
    study = _study([LORA | {"rank": [2, 4, 8, 16, 32]}], seeds=4, micro_batch_size=8)
    costs = Costs(study, SITE)
    assert [len(members) for members in _cohorts(study)] == [7, 7, 6]
    for cohort in costs.cohorts.values():
        assert len(costs.case.passes(cohort, Team())) == 1
    assert misfits(costs) == []


def test_a_large_rank_does_not_keep_small_ones_apart() -> None:
    """Of 7 billion weights, a run of rank 1024 takes more than a pass may: each is a job of
    its own, with the time it has by default, and the small ones are one.
    """
    name = "NousResearch/Llama-2-7b-hf"
    methods = [LORA | {"rank": [2, 8, 1024]}]
    joint, apart = (
        Costs(
            study.model_copy(update={"base": study.base.model_copy(update={"model": name})}), SITE
        )
        for study in (_study(methods, "across", 3), _study(methods, "auto", 3))
    )
    assert list(joint.cohorts) == ["lora-r1024", "together-1"]
    assert [tuning.name for tuning in joint.cohorts["together-1"]] == ["lora-r2"] * 3 + [
        "lora-r8"
    ] * 3
    large = [costs.of("finetune", {"method": "lora-r1024"}) for costs in (joint, apart)]
    assert large[0] == large[1]


def test_a_forecast_counts_each_rank_as_what_it_is() -> None:
    """Checkpoints and disk are the sums of those of the methods, not so many of the largest."""
    ranks = [LORA | {"rank": [2, 128], "learning_rate": [1e-3, 2e-3]}]
    joint, apart = (Costs(_study(ranks, fused), SITE) for fused in ("across", "auto"))
    together = joint.of("finetune_together", {"method": "together-1"})
    alone = {name: apart.of("finetune", {"method": name}) for name in ("lora-r2", "lora-r128")}
    for stage in ("checkpoints", "probes"):
        total = sum(2 * cost.stages[stage] for cost in alone.values())
        assert together.stages[stage] == pytest.approx(total)
    # A base is read for each of four methods and seeds.
    assert together.stages["load"] == pytest.approx(2 * alone["lora-r2"].stages["load"])
    assert together.stages["training"] < sum(2 * c.stages["training"] for c in alone.values())
    case, expected = joint.case, 0.0
    for tuning in joint.cohorts["together-1"]:  # all runs are in training at once
        each = going_bytes(case, tuning, Team()) + finished_bytes(case, tuning)
        expected += len(tuning.settings) * each
    assert together.disk_bytes == pytest.approx(expected, rel=1e-3)


def test_a_mixed_pass_takes_the_memory_and_the_arithmetic_of_its_runs() -> None:
    """On a core of a CPU, where arithmetic is what takes the time: sums over the runs."""
    study = _study([LORA | {"rank": [2, 128]}], batch_size=16)
    case = Case(study, cores(1))
    small, large = tunings(study)
    mixed = step_seconds(case, [small, large, large], Team())
    each = [step_seconds(case, [tuning], Team()) for tuning in (small, large)]
    assert mixed == pytest.approx(each[0] + 2 * each[1])
    state = [trained_state(case, [tuning], Team()) for tuning in (small, large)]
    both = trained_state(case, [small, large], Team())
    assert both - state[0] == pytest.approx(16 * case.shape.trained(large))
    assert both - state[1] == pytest.approx(16 * case.shape.trained(small))
    used = training_bytes(case, [small, large] * 2, Team())
    assert used >= both + 16 * (case.shape.trained(small) + case.shape.trained(large))


def test_what_many_runs_pass_at_once_is_bounded_on_a_cpu_and_told() -> None:
    """Memory grows with what is trained, and no more with the rows of a pass."""
    used = []
    for seeds in (8, 16, 32):
        study = _study([LORA | {"rank": [2]}], seeds=seeds, batch_size=16, micro_batch_size=32)
        case, cohort = Case(study, cores(4)), tunings(study) * seeds
        assert len(case.passes(cohort, Team())) == 1
        own = 16 * seeds * case.shape.trained(cohort[0])
        used.append(training_bytes(case, cohort, Team()) - own)
    assert max(used) < 1.3 * min(used)


def test_runs_that_shared_other_passes_correct_no_forecast() -> None:
    """As the study says now, four runs share one; those that were trained alone tell of others."""
    study = _study([LORA | {"rank": [2, 8]}])
    record = {
        "run": "lora-r2/seed1/lr0.001-wd0", "status": "ok", "steps": 9, "points": [[9, 1.0, 0.5]],
        "training_seconds": 9.0, "wall_seconds": 12.0, "device": "NVIDIA H100",
        "tokens_per_second": 1.0, "peak_memory_gib": 1.0,
    }  # fmt: skip
    costs = Costs(study, SITE)
    (found,) = compare(costs, [record | {"trained_together": 4}])
    assert found.training[0] == 9.0
    assert compare(costs, [record | {"trained_together": 1}]) == []
    auto = Costs(_study([LORA | {"rank": [2, 8]}], "auto"), SITE)
    assert len(compare(auto, [record | {"trained_together": 1}])) == 1


@pytest.mark.parametrize("kind", ["falcon", "gpt2"])
def test_layers_that_are_no_plain_ones_are_known_when_jobs_are_planned(
    kind: str, tmp_path: Path
) -> None:
    """What trains would find them out only then."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
    config = {
        "falcon": FalconConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
        ),
        "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, **still),
    }[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    study = _study([LORA | {"rank": [2, 8]}])
    base = study.base.model_copy(update={"model": str(tmp_path), "revision": None})
    case = Case(study.model_copy(update={"base": base}), GPUS["H100"])
    cohort = tunings(study) * 2
    assert not can_fuse(outline(tmp_path, cohort[0]))
    assert case.passes(cohort, Team()) == [[0], [1], [2], [3]]
    plain = Case(study, GPUS["H100"])
    assert plain.passes(cohort, Team()) == [[0, 1, 2, 3]]


def test_another_way_to_share_passes_is_told_only_to_whom_it_regards(tmp_path: Path) -> None:
    """Else Snakemake would start the jobs of all other methods again."""
    document = yaml.safe_load((ROOT / "config" / "studies" / "mini.yaml").read_text("utf-8"))
    document["methods"] = [LORA | {"rank": [2, 8]}, LORA | {"rank": [4], "variant": "dora"}]
    document["seeds"] = [0, 1]
    told = {}
    for fused in ("auto", "across"):
        document["training"] |= {"fused": fused}
        (tmp_path / "ways.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        commands = _planned_commands(tmp_path, "study=ways.yaml")
        told[fused] = {command for command in commands if "/seed" in command}
    assert len(told["auto"]) == 6
    assert told["across"] == {command for command in told["auto"] if "dora" in command}


def test_a_site_where_nothing_shares_a_pass_is_told_when_it_is_planned() -> None:
    """Steps of 3,000 tokens are large for a CPU, and small for a GPU."""
    study = _study([LORA | {"rank": [2, 8]}], batch_size=128)
    assert misfits(Costs(study, SITE)) == []
    (line,) = misfits(Costs(study, Site.model_validate({"machines": {"device": "CPU"}})))
    assert line.startswith("training.fused: across: no runs of together-1 share a pass on a CPU")
    assert line.endswith("auto gives each a job of its own")


def test_the_items_of_runs_are_in_the_order_of_the_study(tmp_path: Path) -> None:
    """Whether one job trained them or several; a job whose runs all diverged has none."""
    study = _study([LORA | {"rank": [2, 8], "learning_rate": [1e-3, 2e-3]}])
    runs = [
        f"{tuning.name}/seed{seed}/lr{setting.learning_rate:g}-wd0"
        for tuning in tunings(study)
        for seed in study.seeds
        for setting in tuning.settings
    ]
    frames = {run: pd.DataFrame({"run": run, "step": [1, 2]}) for run in runs}
    whole = pd.concat(frames.values(), ignore_index=True)
    write_table(tmp_path / "items.parquet", cohort_items([{"run": runs[0], "points": []}])[0])
    nothing = pd.read_parquet(tmp_path / "items.parquet")
    assert list(nothing.columns) == []
    mixed = [pd.concat([frames[runs[place]] for place in part]) for part in ([6, 7, 0, 1], [4, 5])]
    found = in_order([*mixed, nothing, frames[runs[2]], frames[runs[3]]], tunings(study), [0, 1])
    pd.testing.assert_frame_equal(pd.concat(found, ignore_index=True), whole)


def _planned_commands(folder: Path, config: str) -> list[str]:
    """What the jobs that train would be started with."""
    shutil.copytree(ROOT / "config", folder / "config", dirs_exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    told = subprocess.run(
        [*command, "--dry-run", "--printshellcmds", "--config", config],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    parts = told.split("finetune.py")[1:]
    return [part[: part.index("--items") + 200].split("\n\n")[0] for part in parts]


def test_a_job_of_many_methods_and_seeds_can_be_started(tmp_path: Path) -> None:
    """A shell takes 128 KiB in one argument: what all have in common is told once."""
    document = yaml.safe_load((ROOT / "config" / "studies" / "mini.yaml").read_text("utf-8"))
    document["methods"] = [LORA | {"rank": list(range(1, 41))}]
    document["seeds"] = list(range(5))
    document["training"] |= {"fused": "across", "micro_batch_size": 200}
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    (command,) = _planned_commands(tmp_path, "study=many.yaml")
    words = shlex.split(command[: command.index("--versions")])
    spec = words[words.index("--spec") + 1]
    assert len(json.loads(spec)["members"]) == 200
    assert len(spec) < 2**16
