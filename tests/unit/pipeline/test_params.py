"""The parameters of programs, and the digests by which jobs run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetting import versions
from forgetting.config.job_params import (
    LOCATIONS,
    BenchmarkParams,
    EvaluateBaseParams,
    FinetuneParams,
    Params,
)
from forgetting.errors import InputError
from forgetting.pipeline.params import StudyParams
from forgetting.pipeline.paths import PARAMS_FILES, Paths
from forgetting.study.load import load_study

STUDIES = Path(__file__).resolve().parents[3] / "config" / "studies"
NAMES = sorted(path.stem for path in STUDIES.glob("*.yaml"))


def study_params(name: str = "mini", folder: Path | None = None, **changes: Any) -> StudyParams:
    """Return the parameters of a study, some of whose sections are changed."""
    source = name
    if folder is not None:
        document = yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
        for section, values in changes.items():
            merge = isinstance(values, dict)
            document[section] = document.get(section, {}) | values if merge else values
        path = folder / "changed.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        source = str(path)
    name, study = load_study({"study": source}, STUDIES)
    return StudyParams(study, name, Paths(study, name))


def jobs_of(params: StudyParams) -> list[tuple[str, dict[str, str]]]:
    """Return a job of every rule that a study has, with its wildcards."""
    study = params.study
    method = next(iter(params.paths.methods))
    seed = str(study.seeds[0])
    jobs = [(rule, {}) for rule in ("prepare_data", "evaluate_base", "make_tables")]
    jobs += [("pretrain_base" if study.base.pretrain else "register_base", {})]
    jobs += [("finetune", {"method": method, "seed": seed})]
    jobs += [
        ("train_cooldown", {"method": method, "seed": seed, "duration": duration})
        for duration in params.paths.durations
    ]
    jobs += [("select_checkpoint", {"method": method}), ("benchmark", {"method": method})]
    jobs += [("evaluate_wise_ft", {"model": f"{method}/seed{seed}"}), ("benchmark_base", {})]
    return jobs


def digests(params: StudyParams) -> dict[str, str]:
    """Return the digest of a job of every rule."""
    return {rule: params.digest(rule)(wildcards) for rule, wildcards in jobs_of(params)}


@pytest.mark.parametrize("name", NAMES)
def test_programs_read_the_parameters_that_rules_write(name: str, tmp_path: Path) -> None:
    params = study_params(name)
    params.paths.results = str(tmp_path)
    for rule, wildcards in jobs_of(params):
        written = params.of(rule, wildcards)
        params.write(rule, wildcards)
        path = Path(params.paths.params(rule).format(**wildcards))
        assert type(written).read(path) == written


@pytest.mark.parametrize("name", NAMES)
def test_parameters_in_digests_have_no_path_of_the_checkout(name: str) -> None:
    """A finished study is still finished after its folder was moved."""
    params = study_params(name)
    for rule, wildcards in jobs_of(params):
        text = params.of(rule, wildcards).model_dump_json(exclude=LOCATIONS)
        assert str(STUDIES.parents[1]) not in text, rule


def test_all_rules_with_parameters_have_a_class() -> None:
    jobs = {rule for name in NAMES for rule, _ in jobs_of(study_params(name))}
    assert jobs == set(PARAMS_FILES)


def test_only_changed_parameters_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = study_params()
    params.write("evaluate_base", None)
    path = Path(params.paths.params("evaluate_base"))
    before = path.stat().st_ino
    params.write("evaluate_base", None)
    assert path.stat().st_ino == before
    path.write_text("{}")
    with pytest.raises(InputError, match=r"evaluate_base\.json"):
        EvaluateBaseParams.read(path)
    params.write("evaluate_base", None)
    assert EvaluateBaseParams.read(path) == params.of("evaluate_base", {})


def test_rules_without_parameters_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = study_params()
    monkeypatch.chdir(tmp_path)
    for rule in ("report", "publish", "generate_microworld", "run_programs"):
        params.write(rule, {})
    assert not list(tmp_path.iterdir())


CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "title": ({"title": "Another"}, set()),
    "precision": (
        {"precision": "float32"},
        {"pretrain_base", "evaluate_base", "finetune", "evaluate_wise_ft"}
        | {"benchmark", "benchmark_base"},
    ),
    "limit": ({"train_limit": 3}, {"prepare_data"}),
    "training": ({"training": {"batch_size": 3}}, {"finetune"}),
    "threshold": (
        {"selection": {"threshold": 0.5}},
        {"finetune", "select_checkpoint"},
    ),
    "batch size of benchmarks": (
        {"benchmarks": {"batch_size": 3}},
        {"benchmark", "benchmark_base"},
    ),
    "sandbox": ({"benchmarks": {"sandbox": "none"}}, set()),
    "during training": (
        {"benchmarks": {"during_training": {"arc_challenge": 2}}},
        {"evaluate_base", "finetune"},
    ),
    "seeds": ({"seeds": [0, 1]}, {"select_checkpoint", "benchmark"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_in_the_digests_of_its_jobs(name: str, tmp_path: Path) -> None:
    changes, expected = CHANGES[name]
    before, after = digests(study_params()), digests(study_params("mini", tmp_path, **changes))
    changed = {rule for rule in before if before[rule] != after[rule]}
    assert changed == expected | {"make_tables"}


def test_raised_version_is_in_the_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(study_params())
    monkeypatch.setitem(versions.VERSIONS, "select", versions.VERSIONS["select"] + 1)
    after = digests(study_params())
    assert {rule for rule in before if before[rule] != after[rule]} == {"select_checkpoint"}


def test_benchmarks_leave_out_what_changes_no_score() -> None:
    params = study_params().of("benchmark", {"method": "full"})
    assert isinstance(params, BenchmarkParams)
    assert params.benchmarks.dataset is None and params.models == ["seed0"]
    base = study_params().of("benchmark_base", {})
    assert isinstance(base, BenchmarkParams) and base.models == []


def test_batched_training_is_named_only_where_it_is_allowed() -> None:
    params = study_params()
    allowed = {}
    for method in params.paths.methods:
        found = params.of("finetune", {"method": method, "seed": "0"})
        assert isinstance(found, FinetuneParams)
        allowed[method] = found.run_group.training.batched_lora
    assert allowed.pop("full") == "never"
    assert set(allowed.values()) == {"auto"}


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="versions"):
        Params.model_validate({"versions": "1"})
