"""Where the inputs and outputs of a study's jobs are, without Snakemake's rules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from forgetting.config.study import StudyConfig
from forgetting.pipeline.paths import PARAMS_FILES, Paths, first_output_folder, scored_models_folder
from forgetting.study.load import load_study

STUDIES = Path(__file__).resolve().parents[3] / "config" / "studies"


def load_paths(name: str = "mini", folder: Path | None = None, **changes: Any) -> Paths:
    """Return the paths of a study, some of whose sections are changed."""
    if folder is None:
        name, study = load_study({"study": name}, STUDIES)
        return Paths(study, name)
    document = yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8"))
    for section, values in changes.items():
        document[section] = document.get(section, {}) | values
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    name, study = load_study({"study": str(path)}, STUDIES)
    return Paths(study, name)


def ancient_paths(paths: list[Any]) -> list[str]:
    """Return those paths whose date does not count."""
    return [str(path) for path in paths if getattr(path, "flags", {}).get("ancient")]


def test_tables_come_from_microworld_hub_or_folder(tmp_path: Path) -> None:
    assert load_paths().table("world/new_authors") == "results/mini/world/world/new_authors.jsonl"
    hub = load_paths("tofu-phi-1.5")
    table = next(table for table in hub.prepared_tables if table.startswith("tofu/"))
    dataset = hub.study.datasets["tofu"]
    folder = f"resources/datasets/{dataset.hub}/{dataset.revision}"
    assert hub.table(table) == f"{folder}/{table.removeprefix('tofu/')}.jsonl"
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    own = load_paths(folder=tmp_path, datasets={"own": {"folder": str(tmp_path)}})
    assert own.table("own/rows") == str(tmp_path / "rows.csv")
    assert not own.is_users("world/documents") and own.is_users("own/rows")
    inputs = own.table_inputs(["own/rows", "world/documents"])
    assert ancient_paths(inputs) == [str(tmp_path / "rows.csv")]


def test_prepared_tables_have_no_duplicates() -> None:
    paths = load_paths()
    study = paths.study
    named = {*study.train, *(table for probe in study.probes.values() for table in probe.table)}
    assert study.base.pretrain
    assert paths.prepared_tables.keys() == named | {*study.base.pretrain.documents}
    assert len(paths.prepared_table_inputs) == len(paths.prepared_tables)


def test_run_groups_have_a_file_per_method_and_seed() -> None:
    paths = load_paths("tofu-phi-1.5")
    files = paths.result_files("runs.json", ["full"])
    assert files == [f"results/tofu-phi-1.5/runs/full/seed{seed}/runs.json" for seed in (0, 1, 2)]
    wildcards = SimpleNamespace(method="full")
    assert paths.selection_runs(wildcards) == files
    checkpoints = paths.selection_checkpoints(wildcards)
    assert ancient_paths(checkpoints) == [
        f"results/tofu-phi-1.5/state/checkpoints/full/seed{seed}.json" for seed in (0, 1, 2)
    ]


def test_results_of_durations_are_those_of_branches() -> None:
    paths = load_paths("biderman-math-ift")
    files = paths.result_files("runs.json", ["full"])
    assert len(files) == len(paths.durations) == 5
    assert files[0] == "results/biderman-math-ift/branches/full/seed0/duration1/runs.json"
    assert paths.job_results(None)["trunks"]


def test_task_rows_are_files_or_downloaded_folders() -> None:
    world = load_paths()
    assert world.task_folder("arc_challenge") == "results/mini/world/world/benchmarks/arc_challenge"
    assert all(path.endswith(".jsonl") for path in world.task_inputs(world.tasks))
    hub = load_paths("tofu-phi-1.5")
    assert all(path.startswith("resources/benchmarks/") for path in hub.task_inputs(hub.tasks))
    assert hub.users_task_files(hub.tasks) == {}


def test_training_benchmarks_add_outputs(tmp_path: Path) -> None:
    paths = load_paths()
    assert paths.base_benchmarks == paths.run_group_benchmarks == []
    changed = load_paths(folder=tmp_path, benchmarks={"during_training": {"arc_challenge": 2}})
    assert changed.base_benchmarks == ["results/changed/base/benchmarks.parquet"]
    assert len(changed.tables) == len(paths.tables) + 2
    assert len(changed.job_results(None)["during_training"]) == 1 + len(changed.methods)


def test_lost_results_are_missing_files_of_a_finished_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = load_paths()
    assert paths.lost_results(None) == []
    page = Path(paths.page)
    page.parent.mkdir()
    page.touch()
    lost = paths.lost_results(None)
    assert paths.base_record in lost and paths.page not in lost


def test_base_is_pretrained_or_downloaded() -> None:
    hub = load_paths("tofu-phi-1.5")
    base = hub.study.base
    assert hub.model_inputs == [f"resources/models/{base.model}/{base.revision}"]
    assert hub.local_model_files == {}
    assert load_paths().base("model") == "results/mini/base/model"


def test_parameter_files_have_the_wildcards_of_their_rule() -> None:
    paths = load_paths()
    assert len(set(map(paths.params, PARAMS_FILES))) == len(PARAMS_FILES)
    assert paths.params("finetune") == "results/mini/params/finetune/{method}/seed{seed}.json"


def test_folders_follow_from_outputs() -> None:
    assert first_output_folder(None, ["a/b/c.jsonl"]) == "a/b"
    assert scored_models_folder(None, ["a/full/seed0/scores.parquet"]) == "a/full"


def test_every_study_has_paths() -> None:
    for path in sorted(STUDIES.glob("*.yaml")):
        paths = load_paths(path.stem)
        assert isinstance(paths.study, StudyConfig)
        assert len(set(paths.tables)) == len(paths.tables)
