"""The jobs on packed batches: documents stay apart, terms are named and ordered, recomputing changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quietgoose.routing.library import ExpertLibrary
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.recipe import ExpertSettings, GateSettings, RowTrainSettings
from quietgoose.train.types import Batch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = ("ant", "bee")


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa",
        )
    )  # fmt: skip


def packed() -> tuple[Batch, list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Two rows: (document of 5, document of 3, 1 padding) of bee and (document of 9) of ant."""
    g = torch.Generator().manual_seed(1)
    documents = [(e, torch.randint(3, 50, (n,), generator=g)) for e, n in ((1, 5), (1, 3), (0, 9))]
    labelled = [(e, d, torch.cat([d[1:], torch.tensor([-100])])) for e, d in documents]
    pad = torch.zeros(1, dtype=torch.long)
    rows = [labelled[:2], labelled[2:]]
    tokens = [torch.cat([d for _, d, _ in row]) for row in rows]
    labels = [torch.cat([y for _, _, y in row]) for row in rows]
    position = [torch.cat([torch.arange(len(d)) for _, d, _ in row]) for row in rows]
    segment = [torch.cat([torch.full((len(d),), i + 1) for i, (_, d, _) in enumerate(row)]) for row in rows]
    batch = Batch(
        torch.stack([torch.cat([tokens[0], pad]), tokens[1]]),
        torch.stack([torch.cat([labels[0], pad - 100]), labels[1]]),
        torch.stack([torch.cat([position[0], pad]), position[1]]),
        torch.stack([torch.cat([segment[0], pad]), segment[1]]).int(),
        torch.tensor([1, 0]),
    )
    return batch, labelled


def settings(recompute: bool = False) -> ExpertSettings:
    return ExpertSettings(rank=2, alpha=4.0, train=RowTrainSettings(activation_checkpointing=recompute))


def randomise(job: ExpertJob | GateJob) -> None:
    for i, name in enumerate(job.names):
        flat = job.bank.flat(name)
        flat.data.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(i)) * 0.2)


def trained(job: ExpertJob | GateJob) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in job.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sums_equal_documents_one_by_one(attention: str) -> None:
    model = make_model()
    model.set_attn_implementation(attention)
    job = ExpertJob(model, attention, NAMES, settings(), seed=0)
    randomise(job)
    batch, documents = packed()
    terms = job(batch)
    want = torch.zeros(2)
    for expert, tokens, labels in documents:
        alone = Batch(
            tokens[None], labels[None], torch.arange(len(tokens))[None], torch.ones(1, len(tokens)).int(),
            torch.tensor([expert]),
        )  # fmt: skip
        want += job(alone).sum_E.detach()
    assert job.names == NAMES
    torch.testing.assert_close(terms.sum_E, want, rtol=1e-5, atol=1e-4)


def test_recomputing_activations_changes_no_gradient() -> None:
    grads = []
    for recompute in (False, True):
        job = ExpertJob(make_model(), "sdpa", NAMES, settings(recompute), seed=0).train()
        randomise(job)
        job(packed()[0]).sum_E.sum().backward()
        grads.append(torch.cat([p.grad for g in job.parameter_groups() for p in g["params"]]))
        assert job.model.is_gradient_checkpointing == recompute
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def test_gates_follow_experts_into_a_library() -> None:
    first = ExpertJob(make_model(), "sdpa", NAMES, settings(), seed=0)
    randomise(first)
    library = ExpertLibrary(first.experts(trained(first)))
    job = GateJob(make_model(), "sdpa", library, GateSettings())
    groups = job.parameter_groups()
    assert [group["name"] for group in groups] == list(NAMES)
    optimizer = torch.optim.AdamW([{"params": g["params"]} for g in groups], lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        sums = job(packed()[0]).sum_E
        sums.sum().backward()
        optimizer.step()
        losses.append(float(sums.detach().sum()))
    assert losses[-1] < losses[0]
    gated = job.library(trained(job))
    assert gated.names == NAMES
    assert all(expert.gates is not None for expert in gated)
    assert [e.tensor_hash() for e in gated] == [e.tensor_hash() for e in library]


def misrouted(p: float) -> ExpertJob:
    job = ExpertJob(make_model(), "sdpa", NAMES, ExpertSettings(rank=2, alpha=4.0, misrouting=p), seed=0)
    randomise(job)
    return job


def numbered(batch: Batch, rows: list[int]) -> Batch:
    return dataclasses.replace(batch, row_B=torch.tensor(rows))


def test_misrouting_follows_the_row_whatever_the_batch() -> None:
    """The shares of a row depend on seed, step and the row's number: not on its place in the batch."""
    job = misrouted(0.5)
    batch = numbered(packed()[0], [7, 3])
    job.begin_step(4, torch.ones(2))
    shares = job._shares(batch)
    assert shares.shape == (len(job.sites), 2, 9, 1)
    turned = dataclasses.replace(batch.map(lambda tensor: tensor.flip(0)))
    assert torch.equal(job._shares(turned), shares.flip(1))
    job.begin_step(5, torch.ones(2))
    assert not torch.equal(job._shares(batch), shares)


def test_misrouting_weakens_the_stated_share_of_tokens() -> None:
    job = misrouted(0.25)
    many = Batch(*(torch.zeros(64, 50, dtype=torch.long) for _ in range(4)), torch.zeros(64).long(), torch.arange(64))
    shares = job._shares(many)
    weak = shares[shares < 1]
    assert abs(weak.numel() / shares.numel() - 0.25) < 0.01
    assert abs(weak.mean().item() - 0.5) < 0.01
    assert weak.min() >= 0
    assert weak.max() > 0.99


def test_misrouting_reaches_the_loss_and_every_site() -> None:
    batch = numbered(packed()[0], [0, 1])
    losses = {}
    for p in (0.0, 1.0):
        job = misrouted(p)
        job.begin_step(0, torch.ones(2))
        losses[p] = job(batch).sum_E
        losses[p].sum().backward()
        for name in NAMES:
            assert job.bank.flat(name).grad is not None
    assert not torch.allclose(losses[0.0], losses[1.0])
    job = misrouted(1.0)  # the same numbers by hand: adapters scaled by the shares
    job.begin_step(0, torch.ones(2))
    shares = job._shares(batch)
    seen = []
    for index, module in enumerate(job._routed.values()):
        module.adapter.register_forward_hook(lambda m, args, out, i=index: seen.append((i, m, *args, out)))
    job(batch)
    for index, adapter, x, y, out in seen:
        a_BRI, b_BOR = job.context.adapters[index]
        update = adapter.scale * torch.einsum("bti,bri,bor->bto", x, a_BRI, b_BOR) * shares[index]
        assert torch.allclose(out, y + update, atol=1e-6)
