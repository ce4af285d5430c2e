"""Log-probabilities equal a plain computation, in any batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    FalconConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3Config,
)

from forgetting.data.tokenize import Example
from forgetting.evaluation.prefix_tree import (
    answer_logprobs,
    build_prefix_tree,
    supports_custom_mask,
)
from forgetting.evaluation.probes import mean_logprobs
from forgetting.models.forward import collate, length_batches, micro_batches, token_logprobs

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 50
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=1),
    "phi": PhiConfig(**SHAPE),
    "qwen": Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=16),
    "neox": GPTNeoXConfig(**SHAPE),
}


def _examples(count: int = 9) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 4), (1, 1), (10, 2), (2, 12), (5, 5), (1, 8), (7, 1), (4, 3), (6, 6)]
    return [
        Example(torch.randint(1, VOCABULARY, (head + tail,), generator=generator).tolist(), head)
        for head, tail in sizes[:count]
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Return a random model of each architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Auto.from_config(ARCHITECTURES[request.param]).eval()


def _plain(model: PreTrainedModel, example: Example) -> Tensor:
    """Return the log-probabilities of the targets of one sequence, in float64."""
    ids = torch.tensor([example.ids])
    logits = model.double()(input_ids=ids).logits[0].log_softmax(-1)
    model.float()
    targets = range(example.prompt_length, len(example.ids))
    return torch.stack([logits[place - 1, example.ids[place]] for place in targets])


@torch.no_grad()
def test_logprobs_equal_a_float64_computation(model: PreTrainedModel) -> None:
    examples = _examples()
    ours = token_logprobs(model, collate(examples, pad=0))
    for row, example in zip(ours, examples, strict=True):
        expected = _plain(model, example)
        assert row[row != 0].double().tolist() == pytest.approx(expected.tolist(), abs=2e-5)


@torch.no_grad()
def test_padded_batch_scores_equal_single_scores(model: PreTrainedModel) -> None:
    examples = _examples()
    together = mean_logprobs(model, examples, 0, len(examples))
    for batch_size in (1, 2, 7):
        separate = mean_logprobs(model, examples, 0, batch_size)
        assert separate == pytest.approx(together, abs=1e-5)


@torch.no_grad()
def test_padding_token_does_not_change_scores(model: PreTrainedModel) -> None:
    first, second = (token_logprobs(model, collate(_examples(), pad=pad)) for pad in (0, 17))
    assert torch.equal(first, second)


def _gradients(model: PreTrainedModel, examples: list[Example], size: int) -> tuple[float, Tensor]:
    """Return the mean loss per target and its gradient over micro-batches of a size."""
    model.zero_grad()
    targets = sum(example.targets for example in examples)
    total = 0.0
    for start in range(0, len(examples), size):
        part = collate(examples[start : start + size], pad=0)
        loss = -token_logprobs(model, part).sum() / targets
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_splitting_a_batch_changes_neither_loss_nor_gradient(model: PreTrainedModel) -> None:
    examples = _examples()
    loss, gradient = _gradients(model, examples, len(examples))
    for size in (1, 2, 4):
        other_loss, other = _gradients(model, examples, size)
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert torch.allclose(other, gradient, atol=1e-5)


# Windows, convolutions, recurrent states and position biases.
PECULIAR = {
    "window": MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=4),
    "windows in some layers": Gemma3TextConfig(
        **SHAPE,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "convolution": Lfm2Config(
        **SHAPE, num_key_value_heads=1, layer_types=["conv", "full_attention"]
    ),
    "state": FalconH1Config(
        **SHAPE,
        num_key_value_heads=1,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
    ),
    "bias by distance": FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        alibi=True,
        initializer_range=0.3,
    ),
}


def _questions() -> list[list[Example]]:
    """Return answers of several lengths to four questions; the last ones share a prefix."""
    generator = torch.Generator().manual_seed(2)

    def draw(size: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()

    separate = [
        [Example(head + draw(size), len(head)) for size in sizes]
        for head, sizes in [(draw(3), (4, 1, 6)), (draw(9), (2, 5)), (draw(1), (3, 3, 3, 2))]
    ]
    alike = [[7], [7, 8, 9], [7, 8, 1, 2], [7, 8, 9], [8, 9, 7]]
    return [*separate, [Example([3, 4, *answer], 2) for answer in alike]]


def _assert_sharing_changes_nothing(model: PreTrainedModel) -> None:
    questions = _questions()
    separate = mean_logprobs(model, [e for group in questions for e in group], 0, 1)
    for batch_size in (1, 4, 64):
        shared = answer_logprobs(model, questions, 0, batch_size)
        assert [len(several) for several in shared] == [3, 2, 4, 5]
        together = [value for several in shared for value in several]
        assert together == pytest.approx(separate, abs=1e-5)


@torch.no_grad()
def test_shared_prefix_matches_separate_scores(model: PreTrainedModel) -> None:
    assert supports_custom_mask(model)
    _assert_sharing_changes_nothing(model)


def test_common_answer_prefixes_are_computed_once() -> None:
    """The model reads 2 tokens of the question, 7, 8, 1 of a shared prefix, and 8, 9 of another."""
    tree = build_prefix_tree(_questions()[-1])
    assert tree.ids == [3, 4, 7, 8, 1, 8, 9]
    assert tree.parents == [-1, 0, 1, 2, 3, 1, 5]
    assert tree.paths == [[1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3], [1, 5, 6]]


@pytest.mark.parametrize("kind", PECULIAR)
@torch.no_grad()
def test_prefix_is_shared_only_if_no_score_changes(kind: str) -> None:
    """In some models an answer would change the scores of the next one despite the mask."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Auto.from_config(PECULIAR[kind]).eval()
    if supports_custom_mask(model):
        _assert_sharing_changes_nothing(model)


class _Rule(nn.Module):
    """A model that predicts t + `add` after token t."""

    def __init__(self, add: int) -> None:
        super().__init__()
        self.add = add

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> SimpleNamespace:
        following = (input_ids + self.add) % VOCABULARY
        logits = 60.0 * nn.functional.one_hot(following, VOCABULARY)
        return SimpleNamespace(logits=logits[:, logits_to_keep])


@pytest.mark.parametrize("shift", [-1, 0, 1, 2])
def test_target_is_predicted_from_the_token_before_it(shift: int) -> None:
    """In sequences of successive numbers only a model that adds 1 is right."""
    examples = [
        Example(list(range(start, start + size)), head)
        for start, size, head in [(1, 6, 2), (9, 4, 3), (20, 12, 1)]
    ]
    logprobs = token_logprobs(_Rule(shift), collate(examples, pad=0))
    batch = collate(examples, pad=0)
    scored = logprobs[batch.labels != -100]
    assert len(scored) == sum(example.targets for example in examples)
    assert bool((scored > -1e-6).all()) is (shift == 1)
    if shift != 1:
        assert bool((scored < -50).all())


def test_batch_marks_exactly_the_targets() -> None:
    batch = collate([Example([5, 6, 7, 8], 2), Example([1, 2, 3], 1)], pad=9)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 9]]
    assert batch.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.columns.tolist() == [0, 1, 2]
    assert batch.labels.tolist() == [[-100, 7, 8], [2, 3, -100]]
    assert batch.targets == 4


@torch.no_grad()
def test_head_runs_only_at_predicted_positions(model: PreTrainedModel) -> None:
    """A row with two targets after a long prompt has two positions, not eleven."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    token_logprobs(model, collate([_examples()[2]], pad=0))
    handle.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(1, 2)]


def test_batches_by_length_hold_every_index_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 4, 2, 7]
    batches = list(length_batches(lengths, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(7))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("overhead", [0, 10, 100_000])
def test_micro_batches_minimize_computed_tokens(most: int, overhead: int) -> None:
    """The optimum is over all divisions of the examples sorted by length."""
    lengths = [7, 30, 8, 31, 5, 29, 90]
    parts = micro_batches(lengths, most, overhead)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert max(map(len, parts)) <= most

    def cost(parts: list[list[int]]) -> int:
        return sum(len(part) * max(lengths[i] for i in part) + overhead for part in parts)

    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    ways = []
    for cuts in range(2 ** (len(order) - 1)):
        way, begin = [], 0
        for end in range(1, len(order) + 1):
            if end == len(order) or cuts >> (end - 1) & 1:
                way.append(order[begin:end])
                begin = end
        if max(map(len, way)) <= most:
            ways.append(way)
    assert cost(parts) == min(cost(way) for way in ways)
