"""Loading, checking and expanding studies: names of methods, options, messages, smoke test size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetting.config.expand import expand_methods, law_methods
from forgetting.config.study import StudyConfig
from forgetting.errors import InputError
from forgetting.study.load import load_study, study_source
from forgetting.study.preflight import check_folders, check_inputs
from support.invalid_studies import assert_reports, edited, invalid_studies

STUDY = """\
title: A small study
seeds: [0, 1]
datasets:
  facts: {folder: FOLDER}
  world: {generate: micro-world}
base:
  pretrain:
    documents: [world/documents]
    hidden_size: 64
    intermediate_size: 128
train: facts/new
probes:
  new:
    table: facts/new
    knowledge: new
  old:
    table: facts/old
    knowledge: old
methods:
  - method: lora
    rank: [2, 8]
    learning_rate: [1.0e-3, 5.0e-3]
  - method: full
    learning_rate: 1.0e-4
    weight_decay: [0, 0.01]
selection:
  probe: new
  threshold: 0.9
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that writes the study with some of its text replaced."""
    folder = tmp_path / "facts"
    folder.mkdir()
    row = {"question": "Who?", "answer": "Ann.", "perturbed_answer": ["Bob.", "Cid."]}
    for table, more in (("new", {}), ("old", {"question": "Where?", "answer": "Oslo."})):
        (folder / f"{table}.jsonl").write_text(json.dumps(row | more) + "\n")

    def write_study(*changes: tuple[str, str]) -> Path:
        text = edited(STUDY, changes).replace("FOLDER", str(folder))
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_study


def _message(path: Path, **config: Any) -> str:
    """Return the message of the one mistake, which is one line."""
    with pytest.raises(InputError) as error:
        _check(path, **config)
    message = str(error.value)
    assert "\n" not in message, message
    return message


def _check(path: Path, **config: Any) -> None:
    """Read and check the study as the Snakefile does."""
    options = {"study": str(path), **config}
    _, study = load_study(options, path.parent)
    check_inputs(study, study_source(options, path.parent).locate)


def _load(path: Path, **config: Any) -> StudyConfig:
    return load_study({"study": str(path), **config}, path.parent)[1]


@pytest.mark.parametrize("row", invalid_studies("small"))
def test_invalid_study_is_reported_by_line_and_key(
    write: Any, tmp_path: Path, row: dict[str, Any]
) -> None:
    path = write(*row["edit"].items())
    assert_reports(_message(path), row, path, tmp_path / "facts")


def test_expand_methods_follows_the_study(write: Any) -> None:
    name, study = load_study({"study": str(write())}, Path("nowhere"))
    assert name == "small"
    assert [method.name for method in expand_methods(study)] == ["lora-r2", "lora-r8", "full"]
    assert [len(method.hyperparameters) for method in expand_methods(study)] == [2, 2, 2]
    assert expand_methods(study)[2].hyperparameters[1].model_dump() == {
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
    }


def test_laws_are_of_the_most_ranks_of_equal_adapters(write: Any) -> None:
    text = STUDY.replace("rank: [2, 8]", "rank: [2, 8, 32]") + (
        "general_text: {table: world/held_out}\n"
    )
    content = yaml.safe_load(text.replace("FOLDER", "."))

    def names(*methods: dict[str, Any], **changes: Any) -> list[str]:
        study = content | changes | {"methods": [*content["methods"], *methods]}
        return [method.name for method in law_methods(StudyConfig.model_validate(study))]

    assert names() == ["lora-r2", "lora-r8", "lora-r32"]
    assert names(general_text=None) == []
    dora = {"method": "lora", "variant": "dora", "learning_rate": 1e-3}
    assert names(dora | {"rank": [1, 2]}) == ["lora-r2", "lora-r8", "lora-r32"]
    assert len(names(dora | {"rank": [1, 2, 4, 8]})) == 4
    again = {"method": "lora", "rank": 8, "alpha": 64, "suffix": "b", "learning_rate": 1e-3}
    assert names(again) == []


def test_find_study_by_name_lists_known_names(write: Any) -> None:
    path = write()
    assert load_study({"study": "small"}, path.parent)[0] == "small"
    with pytest.raises(InputError, match=r"study=smal: there is no .*; expected one of small"):
        load_study({"study": "smal"}, path.parent)


@pytest.mark.parametrize(
    "sections",
    [
        "evaluation: {every_epochs: 10}",
        "training: {epochs: 1, batch_size: 1, warmup_epochs: 0.9}",
        "training: {epochs: 1, batch_size: 1, warmup_steps: 7}",
        "training: {epochs: 2, batch_size: 5, warmup_steps: 3}",
        "training: {epochs: 0.5, batch_size: 1, warmup_ratio: 0.8}\n"
        "evaluation: {every_epochs: 0.5}",
        "training: {epochs: 1, batch_size: 5, warmup_steps: 7, packing: true}",
        "training: {epochs: 8, batch_size: 8, warmup_steps: 6, schedule: wsd, durations: [1, 8]}",
        "training: {epochs: 4, batch_size: 2, warmup_ratio: 0.3, schedule: cosine, "
        "durations: [1, 4]}",
        "training: {epochs: 1, batch_size: 2, warmup_epochs: 0, schedule: wsd, decay_ratio: 1}",
    ],
)
def test_longest_allowed_warmup_and_durations_are_accepted(
    write: Any, tmp_path: Path, sections: str
) -> None:
    """There are eight rows. The number of packed sequences is not known without a tokenizer."""
    _eight_rows(tmp_path)
    _check(write(("\ntrain:", f"\n{sections}\ntrain:")))


def _eight_rows(tmp_path: Path) -> None:
    path = tmp_path / "facts" / "new.jsonl"
    path.write_text("".join(path.read_text().replace("Who", f"Who {n}") for n in range(8)))


@pytest.mark.parametrize(
    ("training", "key", "expected"),
    [
        ("epochs: 1, warmup_steps: 500", "warmup_steps", "500 steps of warm-up leave nothing of "),
        ("epochs: 2, batch_size: 4, warmup_steps: 4", "warmup_steps", "which has 4 (2 epochs of 8"),
        ("epochs: 1, batch_size: 8, warmup_epochs: 0.9", "warmup_epochs", "1 steps of warm-up"),
        ("epochs: 1, batch_size: 2, warmup_ratio: 0.9", "warmup_ratio", "which has 4 (1 epochs"),
        (
            "epochs: 4, batch_size: 2, warmup_epochs: 1, schedule: cosine, durations: [1, 4]",
            "warmup_epochs",
            "which has 4 (1 epochs",
        ),
        (
            "epochs: 2, batch_size: 1, warmup_epochs: 1, schedule: wsd, decay_ratio: 0.6",
            "warmup_epochs",
            "8 steps of warm-up go on when the cooldown begins, after 6 of 16 (2 epochs",
        ),
        (
            "epochs: 2, batch_size: 1, warmup_steps: 3, schedule: inverse_sqrt, decay_ratio: 1",
            "warmup_steps",
            "after 0 of 16",
        ),
        (
            "epochs: 8, batch_size: 8, warmup_steps: 8, schedule: wsd, durations: [1, 8]",
            "warmup_steps",
            "8 steps of warm-up",
        ),
    ],
)
def test_warmup_longer_than_training_is_refused(
    write: Any, tmp_path: Path, training: str, key: str, expected: str
) -> None:
    """The learning rate would never reach its peak, which the report shows."""
    _eight_rows(tmp_path)
    path = write(("\ntrain:", f"\ntraining: {{{training}}}\ntrain:"))
    message = _message(path)
    line = path.read_text().split("training:")[0].count("\n") + 1
    assert message.startswith(f"{path}, line {line}: training.{key}: ")
    assert expected in message
    assert "8 examples" in message
    _check(path, scale="tiny")


def test_warmup_of_text_rows_is_left_to_the_job(write: Any, tmp_path: Path) -> None:
    """The number of blocks of a text is not known without a tokenizer."""
    with (tmp_path / "facts" / "new.jsonl").open("a") as file:
        file.write(json.dumps({"text": "A long story. " * 1000}) + "\n")
    read = ("table: facts/new", "table: facts/old")
    _check(write(read, ("\ntrain:", "\ntraining: {warmup_steps: 500}\ntrain:")))


@pytest.mark.parametrize("stem", ["a{b}", "my study", "-n", ".hidden", "a,b", "année", "a*"])
def test_file_name_invalid_for_results_is_refused(write: Any, stem: str) -> None:
    """Snakemake reads braces as wildcards, and shells split other names."""
    path = write()
    path = path.rename(path.with_name(f"{stem}.yaml"))
    message = _message(path)
    assert message.startswith(f"study={path}: the name of the file is the name of its results")
    assert f"`{stem}`" in message


def test_adafactor_is_refused_for_sharded_full_only(write: Any) -> None:
    """Every process has whole adapters, so adafactor can train them."""
    adafactor = ("train: facts/new", "training: {optimizer: adafactor}\ntrain: facts/new")
    message = _message(write(adafactor, ("  - method: full", "  - method: full\n    processes: 2")))
    assert "methods.1.processes: adafactor needs whole matrices" in message
    path = write(adafactor, ("    rank: [2, 8]", "    rank: [2, 8]\n    processes: 2"))
    _, study = load_study({"study": str(path)}, path.parent)
    assert [method.processes for method in expand_methods(study)] == [2, 2, None]


def test_all_mistakes_are_reported_at_once(write: Any) -> None:
    path = write(("threshold: 0.9", "treshold: 0.9"), ("seeds: [0, 1]", "seeds: 3"))
    with pytest.raises(InputError) as error:
        load_study({"study": str(path)}, path.parent)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(path)) for line in lines)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("&a [*a]", "nested too deeply"),
        ("2026-13-45", "month must be in 1..12"),
        ("1" * 5000, "cannot be read"),
    ],
)
def test_value_that_yaml_cannot_read_is_refused(write: Any, value: str, expected: str) -> None:
    path = write(("title: A small study", f"title: {value}"))
    message = _message(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_quoted_text_is_not_converted(write: Any) -> None:
    path = write(("title: A small study\n", "title: '0200'\ndescription: \"1:30\"\n"))
    study = load_study({"study": str(path)}, path.parent)[1]
    assert (study.title, study.description) == ("0200", "1:30")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_file_without_keys_is_refused(write: Any, text: str) -> None:
    path = write()
    path.write_text(text)
    assert "expected a study, a mapping of keys to values" in _message(path)


def test_file_that_is_not_utf8_is_refused(write: Any) -> None:
    path = write()
    path.write_bytes(STUDY.replace("small", "sm\xe5ll").encode("latin-1"))
    assert str(path) in _message(path)


SAME_RANK = {
    "alpha": ("lora, rank: 8, alpha: 16.0", "lora-r8-other", "rank 8, other"),
    "layers": ("lora, rank: 8, target_modules: [q_proj]", "lora-r8-other", "rank 8, other"),
    "dropout": ("lora, rank: 8, dropout: 0.1", "lora-r8-other", "rank 8, other"),
    "all weights": ("full", "full-other", "full, other"),
    "mitigated": (
        "lora, rank: 8, alpha: 16.0, mitigation: {l2_sp: {weight: 0.1}}",
        "lora-r8-other-l2_sp0.1",
        "rank 8, other, l2_sp0.1",
    ),
}


@pytest.mark.parametrize("differs", SAME_RANK)
def test_suffix_distinguishes_methods_of_one_rank(write: Any, differs: str) -> None:
    """Methods may differ in keys that are not part of the name, such as alpha, at every scale."""
    method, name, label = SAME_RANK[differs]
    entry = f"  - {{method: {method}, suffix: other, learning_rate: 0.1}}\n  - method: full\n"
    path = write(("  - method: full\n", entry))
    whole, tiny = expand_methods(_load(path)), expand_methods(_load(path, scale="tiny"))
    assert [t.name for t in whole] == ["lora-r2", "lora-r8", name, "full"]
    assert [t.name for t in tiny] == [t.name for t in whole]
    assert whole[2].label == label


def test_variants_of_one_rank_have_their_own_names(write: Any) -> None:
    path = write(
        (
            "  - method: full\n",
            "  - {method: lora, variant: rslora, rank: 8, learning_rate: 0.1}\n  - method: full\n",
        )
    )
    assert "rslora-r8" in [method.name for method in expand_methods(_load(path))]


def test_fixed_rule_accepts_one_or_selected_hyperparameters(write: Any) -> None:
    rule = ("threshold: 0.9", "threshold: 0.9\n  hyperparameters: fixed")
    one = ("[1.0e-3, 5.0e-3]", "[1.0e-3]")
    named = (
        "[0, 0.01]",
        "[0, 0.01]\n    selected_hyperparameters: {learning_rate: 1.0e-4, weight_decay: 0.01}",
    )
    study = _load(write(rule, one, named))
    fixed = expand_methods(study)[2].selected_hyperparameters
    assert fixed is not None
    assert fixed.weight_decay == 0.01


def test_model_option_replaces_the_base(write: Any) -> None:
    study = _load(write(), model="someone/something@" + "b" * 40)
    assert (study.base.model, study.base.pretrain) == ("someone/something", None)
    assert study.base.revision == "b" * 40


def test_model_option_on_the_hub_needs_its_commit(write: Any) -> None:
    """A hub model that is not pinned can change during a study."""
    assert "OWNER/NAME@COMMIT" in _message(write(), model="someone/something")


def test_folder_option_replaces_a_dataset(write: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    study = _load(write(), world_dir=str(mine))
    assert study.datasets["world"].folder == str(mine)
    assert study.datasets["world"].generate is None


def test_folder_option_expands_the_home_folder(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    path = write()
    name = next(iter(load_study({"study": str(path)}, path.parent)[1].datasets))
    options = {"study": str(path), f"{name}_dir": "~/mine"}
    assert load_study(options, path.parent)[1].datasets[name].folder == str(tmp_path / "mine")


def test_benchmarks_dir_option_replaces_benchmark_rows(write: Any, tmp_path: Path) -> None:
    study = _load(write(), benchmarks_dir=str(tmp_path))
    assert study.benchmarks.dataset is not None
    assert study.datasets[study.benchmarks.dataset].folder == str(tmp_path)
    assert "there is no such folder" in _message(write(), benchmarks_dir=str(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("wrld_dir", ".", "has no dataset `wrld`, only facts, world"),
        ("world_dir", "/nowhere/at/all", "there is no such folder"),
        (
            "thresold",
            0.8,
            "unknown option; expected study, scale, model, rerun_on_code_change or DATASET_dir",
        ),
        ("scale", "small", "expected full or tiny"),
        ("rerun_on_code_change", "yes", "expected true or false"),
    ],
)
def test_wrong_option_is_reported_by_its_key(
    write: Any, key: str, value: Any, expected: str
) -> None:
    message = _message(write(), **{key: value})
    assert message.startswith(f"--config {key}")
    assert expected in message


def test_smoke_size_keeps_methods_and_shrinks_work(write: Any) -> None:
    """Methods and probes stay; the results have another name, and nothing is on the hub."""
    hub = "{hub: someone/something, revision: " + "a" * 40 + "}"
    path = write(
        ("{generate: micro-world}", hub),
        ("rank: [2, 8]", "rank: [2, 512]"),
        ("hidden_size: 64", "hidden_size: 1024"),
        ("intermediate_size: 128", "num_layers: 8"),
    )
    whole = _load(path)
    name, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert name == "small-tiny"
    assert [t.name for t in expand_methods(tiny)] == [t.name for t in expand_methods(whole)]
    assert tiny.seeds == whole.seeds[:1]
    assert list(tiny.probes) == list(whole.probes)
    assert all(dataset.hub is None for dataset in tiny.datasets.values())
    assert tiny.base.pretrain is not None
    assert tiny.base.pretrain.num_layers == 1
    assert tiny.base.pretrain.hidden_size >= 512
    assert [len(method.hyperparameters) for method in expand_methods(tiny)] == [2, 2, 1]


DURATIONS = """\
training: {schedule: wsd, epochs: 20, warmup_steps: 1000, durations: [0.25, 1, 20]}
selection:
"""


def test_smoke_size_scales_durations(write: Any) -> None:
    """Two epochs replace the training; the warm-up of the study would be longer."""
    tiny = _load(write(("selection:\n", DURATIONS)), scale="tiny")
    assert tiny.training.durations == pytest.approx([0.025, 0.1, 2.0])
    assert (tiny.training.epochs, tiny.training.warmup_steps) == (2.0, None)
    assert StudyConfig.model_validate_json(tiny.model_dump_json()) == tiny


def test_kl_on_replayed_tokens_is_accepted(write: Any, tmp_path: Path) -> None:
    """YAML does not read the key `tokens` as a boolean, unlike `on`."""
    replay = ", replay: {table: facts/more, ratio: 0.5}"
    mitigation = f"mitigation: {{kl: {{weight: 1, tokens: replay}}{replay}}}"
    path = write(("  - method: lora\n", f"  - method: lora\n    {mitigation}\n"))
    (tmp_path / "facts" / "more.jsonl").write_text('{"text": "More."}\n')
    _check(path)


def test_smoke_size_has_no_names_of_layers(write: Any) -> None:
    """The small model may lack the names, and has fewer blocks."""
    named = "    rank: [2, 8]\n    target_modules: [Wqkv]\n"
    hybrid = (
        "  - {method: hybrid, rank: 2, learning_rate: 0.1, "
        "second_stage: {layers: last 9, learning_rate: 0.1}}\n  - method: full\n"
    )
    deep = ("    hidden_size: 64\n", "    hidden_size: 64\n    num_layers: 12\n")
    path = write(("    rank: [2, 8]\n", named), ("  - method: full\n", hybrid), deep)
    whole = _load(path)
    _, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert [t.name for t in expand_methods(tiny)] == [t.name for t in expand_methods(whole)]
    _check(path, scale="tiny")
    with pytest.raises(InputError, match="no linear layer Wqkv"):
        _check(path)


def test_smoke_size_keeps_selected_hyperparameters(write: Any) -> None:
    """The rule `fixed` finds them in the smaller sweep."""
    fixed = "    selected_hyperparameters: {learning_rate: 5.0e-3, weight_decay: 0.0}\n"
    three = ("[1.0e-3, 5.0e-3]\n", "[1.0e-3, 2.0e-3, 5.0e-3]\n" + fixed)
    path = write(three)
    _, tiny = load_study({"study": str(path), "scale": "tiny"}, path.parent)
    assert [each.learning_rate for each in expand_methods(tiny)[0].hyperparameters] == [5e-3]


def test_method_name_has_its_variant_layers_and_loraplus(write: Any) -> None:
    more = (
        "    rank: [2, 8]\n    variant: pissa\n    target_modules: mlp\n"
        "    loraplus_lr_ratio: 16.0\n"
    )
    _, study = load_study({"study": str(write(("    rank: [2, 8]\n", more)))}, Path("nowhere"))
    assert [t.name for t in expand_methods(study)][:2] == [
        "pissa-r2-mlp-plus16",
        "pissa-r8-mlp-plus16",
    ]


def test_methods_of_one_rank_have_unique_names(write: Any) -> None:
    """One study may have several rank budgets, embeddings and hybrids."""
    entries = [
        "{method: lora, rank: 2, variant: adalora, learning_rate: 1.0}",
        "{method: lora, rank: 2, variant: adalora, adalora: {tinit: 0.2, delta_t: 10}, "
        "learning_rate: 1.0}",
        "{method: lora, rank: 2, embeddings: trained, learning_rate: 1.0}",
        "{method: lora, rank: 2, embeddings: trained, embedding_lr_ratio: 0.1, learning_rate: 1.0}",
        "{method: full, embeddings: frozen, learning_rate: 1.0}",
        "{method: hybrid, rank: 2, second_stage: {layers: last 4, learning_rate: 1.0e-5}, "
        "learning_rate: 1.0}",
        "{method: hybrid, variant: dora, rank: 2, second_stage: {start: 0.25, "
        "layers: [layers.*.mlp, lm_head], learning_rate: 1.0e-5}, learning_rate: 1.0}",
        "{method: hybrid, rank: 2, second_stage: {layers: all, learning_rate: 1.0, "
        "suffix: all-late}, learning_rate: 1.0}",
    ]
    methods = expand_methods(
        _load(write(("methods:\n", "methods:\n  - " + "\n  - ".join(entries) + "\n")))
    )
    assert [(method.name, method.label) for method in methods[:8]] == [
        ("adalora-r2", "adalora 2"),
        ("adalora-r2-tinit0.2-delta10", "adalora 2, tinit0.2-delta10"),
        ("lora-r2-embeddings", "rank 2, embeddings trained"),
        ("lora-r2-embeddings0.1", "rank 2, embeddings at 0.1"),
        ("full-frozen-embeddings", "full, embeddings frozen"),
        ("hybrid-r2-last4-at0.5-lr1e-05", "hybrid 2, then last4"),
        (
            "hybrid-dora-r2-layers._.mlp-lm_head-at0.25-lr1e-05",
            "hybrid dora 2, then layers._.mlp-lm_head",
        ),
        ("hybrid-r2-all-late", "hybrid 2, then all-late"),
    ]


def test_adalora_initial_rank_sets_alpha_and_scale(write: Any) -> None:
    """`alpha: 2r` gives a scale of 2 at the initial rank."""
    adalora = "[2, 8]\n    variant: adalora\n    alpha: 2r\n    adalora: {init_r_ratio: 2.0}"
    first, second = expand_methods(_load(write(("[2, 8]", adalora))))[:2]
    assert (first.initial_rank, second.initial_rank) == (4, 16)
    assert (first.scale, second.scale) == pytest.approx((2.0, 2.0), rel=1e-5)


def test_check_folders_refuses_probe_without_wrong_answers(write: Any, tmp_path: Path) -> None:
    path = write()
    check_folders(_load(path))
    (tmp_path / "facts" / "old.jsonl").write_text('{"question": "Who?", "answer": "Ann."}\n')
    with pytest.raises(InputError) as error:
        check_folders(_load(path))
    message = str(error.value)
    assert f"{tmp_path / 'facts' / 'old.jsonl'}, line 1: no `perturbed_answer`" in message
    assert "or set probes.old.truth_ratio: false" in message
    without = ("    table: facts/old\n", "    table: facts/old\n    truth_ratio: false\n")
    check_folders(_load(write(without)))


def test_check_folders_refuses_missing_table(write: Any, tmp_path: Path) -> None:
    path = write()
    (tmp_path / "facts" / "old.jsonl").unlink()
    with pytest.raises(InputError, match=r"there is no old\.jsonl \(nor \.json, nor \.csv\)"):
        check_folders(_load(path))


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[3] / "config" / "studies").glob("*.yaml")),
    ids=lambda path: path.stem,
)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_studies_of_the_repository_are_valid(path: Path, scale: str) -> None:
    text = path.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    folders = {f"{name}_dir": "." for name in document["datasets"] if re.search(r"_dir\b", text)}
    name, study = load_study({"study": path.stem, "scale": scale, **folders}, path.parent)
    assert name.startswith(path.stem)
    assert expand_methods(study)
    # make_tables reads the study from JSON.
    assert StudyConfig.model_validate_json(study.model_dump_json()) == study


@pytest.mark.parametrize("model", ["a/x;touch pwned;", "gpt2", "a/../b", "$(touch pwned)"])
def test_model_without_folder_or_hub_name_is_refused(write: Any, model: str) -> None:
    text = write().read_text()
    start, end = text.index("  pretrain:"), text.index("train: facts/new")
    path = write()
    named = f"  model: {model!r}\n  revision: {'a' * 40}\n"
    path.write_text(text[:start] + named + text[end:])
    assert "base.model: there is no such folder; expected OWNER/NAME" in _message(path)
    with pytest.raises(InputError, match=r"--config model=.*: there is no such folder"):
        load_study({"study": str(write()), "model": f"{model}@{'a' * 40}"}, path.parent)


def test_check_folders_refuses_row_without_text(write: Any, tmp_path: Path) -> None:
    (tmp_path / "facts" / "prose.jsonl").write_text('{"text": "A."}\n{"body": "B."}\n')
    with pytest.raises(InputError, match=r"prose.jsonl, line 2: expected a string `text`"):
        check_folders(
            _load(write(("selection:", "general_text: {table: facts/prose}\nselection:")))
        )


def test_metric_during_training_may_be_named(write: Any) -> None:
    """Accuracy is a mean over items, unlike the perplexity that lambada_openai has first."""
    task = (
        "benchmarks: {tasks: {lambada_openai: {metric: acc}}, during_training: {lambada_openai: 5}}"
    )
    message = _message(write(("selection:\n", f"{task}\nselection:\n")))
    assert "is not a mean" not in message
    assert "needs a `revision`" in message


def test_general_text_that_is_not_trained_on_is_accepted(write: Any) -> None:
    text = "general_text: {table: world/held_out}\nselection:"
    assert _load(write(("selection:", text))).general_text is not None


def test_smoke_size_keeps_a_dataset_named_micro_world(write: Any, tmp_path: Path) -> None:
    """The name is also that of the generated dataset that replaces rows on the hub."""
    own = ("  facts:", f"  micro_world: {{folder: {tmp_path}}}\n  facts:")
    section = "benchmarks: {dataset: micro_world, tasks: {gsm8k: {}}}\nselection:\n"
    tiny = _load(write(own, ("selection:\n", section)), scale="tiny")
    assert tiny.datasets["micro_world"].folder == str(tmp_path)


def test_smoke_size_has_few_samples_and_no_hub_tasks(write: Any) -> None:
    """Rows of the micro-world replace those of tasks on the same dataset."""
    tasks = (
        "humaneval: {samples: 50, temperature: 0.8, k: [1, 10, 50]}, arc_easy: "
        f"{{revision: {'a' * 40}}}, sciq: {{revision: {'a' * 40}}}"
    )
    path = write(("selection:\n", f"benchmarks: {{tasks: {{{tasks}}}}}\nselection:\n"))
    tiny = _load(path, scale="tiny").benchmarks
    assert list(tiny.tasks) == ["humaneval", "arc_easy"]
    humaneval = tiny.tasks["humaneval"]
    assert (humaneval.samples, humaneval.k, humaneval.temperature) == (4, [1, 4], 0.8)
    assert (humaneval.limit, tiny.tasks["arc_easy"].limit) == (4, 4)
