"""All experts (gates) together equal N separate runs; only they move; losses and layouts agree with plain PyTorch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import peft
import pytest
import torch
from quietgoose.base.errors import ArtifactError
from quietgoose.base.files import sha256_tensors
from quietgoose.kernels import linear_loss
from quietgoose.routing import losses, training
from quietgoose.routing.expert import Expert
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import assign_rows, attach, uninstall
from quietgoose.routing.sites import find_sites
from quietgoose.routing.training import TrainableExperts, TrainableGates
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("ant", "bee", "cat")


@dataclass(frozen=True)
class Rows:
    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    expert_B: torch.Tensor


def rows(expert_of_row: list[int], length: int = 7, seed: int = 0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 64, (len(expert_of_row), length), generator=g)
    labels = torch.randint(3, 64, tokens.shape, generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.4] = -100
    return Rows(tokens, labels, torch.tensor(expert_of_row))


def only(batch: Rows, expert: int) -> Rows:
    keep = batch.expert_B == expert
    return Rows(batch.tokens_BT[keep], batch.labels_BT[keep], torch.zeros(int(keep.sum()), dtype=torch.long))


def inputs(batch: Rows) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.tokens_BT}


def experts_of(model, names=NAMES, **changes) -> TrainableExperts:
    settings = {"rank": 4, "alpha": 8.0, "rslora": False, "seed": 3, "inputs": inputs, **changes}
    return TrainableExperts(model, find_sites(model, ["all-linear"]), names, **settings)


def train(module, batches: list[Rows], lr: float = 1e-2, clip: float = 0.5) -> dict[str, torch.Tensor]:
    """AdamW with one group and one clip per expert, as the engine does it."""
    groups = module.parameter_groups()
    optimizer = torch.optim.AdamW([{"params": g["params"]} for g in groups], lr=lr, weight_decay=0.0)
    for batch in batches:
        counts = torch.stack([(batch.labels_BT[batch.expert_B == e] != -100).sum() for e in range(len(groups))])
        optimizer.zero_grad()
        (module(batch) / counts.clamp(min=1)).sum().backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group["params"], clip)
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def randomise(module: TrainableExperts) -> TrainableExperts:
    for name in module.names:
        flat = module.bank.flat(name)
        flat.data.copy_(
            torch.randn(flat.shape, generator=torch.Generator().manual_seed(len(name) + ord(name[0]))) * 0.2
        )
    return module


def row_losses(model, batch) -> torch.Tensor:
    """Summed over each row [B], of the model as it stands."""
    return losses.head_losses(model, *losses.hidden_and_head(model, inputs(batch)), batch.labels_BT).sum(1)


def test_all_experts_together_equal_separate_runs(new_model) -> None:
    batches = [rows([0, 2, 1, 0, 1, 2], seed=s) for s in range(4)]
    together = experts_of(new_model())
    trained = train(together, batches)
    assert list(trained) == [f"bank.flat_{name}" for name in NAMES]
    for e, name in enumerate(NAMES):
        start = experts_of(new_model(), (name,))
        assert torch.equal(start.bank.flat(name), experts_of(new_model()).bank.flat(name))
        alone = train(start, [only(batch, e) for batch in batches])
        torch.testing.assert_close(trained[f"bank.flat_{name}"], alone[f"bank.flat_{name}"], rtol=1e-5, atol=1e-6)


def test_rows_of_one_expert_never_move_another(new_model) -> None:
    module = randomise(experts_of(new_model()))
    module(rows([1, 1])).sum().backward()
    assert module.bank.flat("bee").grad.abs().max() > 0
    assert module.bank.flat("ant").grad.abs().max() == 0
    assert module.bank.flat("cat").grad.abs().max() == 0


def test_fresh_experts_equal_the_base_and_trained_ones_the_attached_model(new_model) -> None:
    batch = rows([0, 1, 2])
    model = new_model()
    logits = model(batch.tokens_BT).logits
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="none")
    module = experts_of(model)
    torch.testing.assert_close(module(batch), want.view(3, -1).sum(1), rtol=1e-5, atol=1e-5)
    trained = train(module, [rows([0, 1, 2], seed=s) for s in range(3)])
    during = module(batch)
    from quietgoose.routing.library import ExpertLibrary

    uninstall(model)
    library = ExpertLibrary(module.experts(trained))
    attach(model, library, "oracle")
    with assign_rows(model, list(NAMES)):
        sums = row_losses(model, batch)
    torch.testing.assert_close(sums, during, rtol=1e-5, atol=1e-4)
    assert library["ant"].card.targets == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )


class Made(TorchDispatchMode):
    """What the operators that run inside make: (operator, dtype, entries)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.found.append((func._schema.name, out.dtype, out.numel()))
        return out


def test_a_bank_in_16_bit_has_no_fp32_copy_and_gradients_are_written_where_they_stay(monkeypatch) -> None:
    monkeypatch.setattr(training, "GATHER_COLUMNS", 8)
    g = torch.Generator().manual_seed(0)
    bank = training.FlatBank({name: torch.randn(27, generator=g) for name in NAMES})
    expert = torch.tensor([2, 0, 0, 2])
    with Made() as forward:
        rows_BP = bank(expert, torch.bfloat16)
    assert torch.equal(rows_BP, torch.stack([bank.flat(name) for name in NAMES]).bfloat16()[expert])
    assert not [made for made in forward.found if made[1] == torch.float32 and made[2] >= 3 * 27]
    upstream = torch.randn(rows_BP.shape, generator=g).bfloat16()
    with Made() as backward:
        rows_BP.backward(upstream)
    assert "aten::copy_" not in {name for name, _, _ in backward.found}
    wide = upstream.float()
    for name, want in zip(NAMES, (wide[1] + wide[2], torch.zeros(27), wide[0] + wide[3])):
        torch.testing.assert_close(bank.flat(name).grad, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gates_that_read_one_input_share_its_wide_copy(new_model, dtype: torch.dtype) -> None:
    """The same losses and gradients as site by site, from fewer operators."""
    library, batch, found = ExpertLibrary(randomised_experts(new_model())), rows([0, 2, 1, 0]), []
    for alone in (True, False):
        module = TrainableGates(new_model().to(dtype), library, inputs)
        for name in NAMES:
            flat = module.bank.flat(name)
            flat.data = torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)).to(
                torch.float64 if dtype == torch.float64 else torch.float32
            )
        if alone:
            module.stop_sharing()
        with Made() as made:
            losses_E = module(batch)
        losses_E.sum().backward()
        products = sum(name == "aten::bmm" for name, _, _ in made.found)
        found.append((losses_E.detach(), torch.stack([module.bank.flat(name).grad for name in NAMES]), products))
    (want, want_grad, products), (got, got_grad, fewer) = found
    close = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert float((got_grad - want_grad).norm() / want_grad.norm()) < close
    layers = len(new_model().model.layers)
    assert products - fewer == 3 * layers  # q, k, v: two products fewer; gate, up: one


def randomised_experts(model) -> list[Expert]:
    module = randomise(experts_of(model))
    return module.experts({f"bank.flat_{name}": module.bank.flat(name) for name in NAMES})


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_equal_plain_autograd_on_merged_weights(new_model, rslora) -> None:
    """d loss / d A and d B through W + s B A, computed without any of our kernels, in fp64."""
    model = new_model().double()
    module = randomise(experts_of(model, rslora=rslora).double())
    batch = rows([1, 1, 1])
    module(batch).sum().backward()
    flat = module.bank.flat("bee").detach().clone().requires_grad_()
    scale = 8.0 / 4**0.5 if rslora else 2.0
    uninstall(model)
    weights = dict(model.named_parameters())
    for site, (a, b) in module.bank.layout.unflatten(flat).items():
        weights[f"{site}.weight"] = weights[f"{site}.weight"] + scale * b @ a
    logits = torch.func.functional_call(model, weights, (batch.tokens_BT,)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
    (want,) = torch.autograd.grad(loss, flat)
    torch.testing.assert_close(module.bank.flat("bee").grad, want, rtol=1e-9, atol=1e-10)


def test_flattened_rows_and_recomputed_blocks_give_the_same(new_model) -> None:
    batch = rows([0, 2, 1], length=5)
    length = 5

    def flat_inputs(batch: Rows) -> dict[str, torch.Tensor]:
        row = torch.arange(3 * length) // length
        mask = (row[:, None] == row) & torch.ones(3 * length, 3 * length, dtype=torch.bool).tril()
        positions = torch.arange(length).repeat(3)[None]
        return {
            "input_ids": batch.tokens_BT.reshape(1, -1),
            "position_ids": positions,
            "attention_mask": mask[None, None],
        }

    results = []
    for changes, recompute in (({}, False), ({"inputs": flat_inputs}, False), ({}, True)):
        model = new_model().train()
        module = randomise(experts_of(model, **changes))
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sums = module(batch)
        sums.sum().backward()
        results.append((sums.detach(), torch.stack([module.bank.flat(n).grad for n in NAMES])))
    for sums, grads in results[1:]:
        torch.testing.assert_close(sums, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-4, atol=1e-5)
    assert results[0][1].abs().amax(dim=1).min() > 0


def test_losses_in_pieces_equal_one_piece(new_model, monkeypatch) -> None:
    batch = rows([0, 1, 2, 0])
    model = new_model()
    module = randomise(experts_of(model))
    whole = module(batch)
    whole.sum().backward()
    grads = [module.bank.flat(n).grad.clone() for n in NAMES]
    module.zero_grad()
    monkeypatch.setattr(linear_loss, "LOGITS_AT_ONCE", 64 * 5)
    pieces = module(batch)
    pieces.sum().backward()
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-5)
    for name, grad in zip(NAMES, grads):
        torch.testing.assert_close(module.bank.flat(name).grad, grad, rtol=1e-4, atol=1e-6)
    empty = dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, -100))
    sums = module(empty)
    sums.sum().backward()
    assert sums.tolist() == [0, 0, 0]


def test_bf16_base_trains_fp32_experts(new_model) -> None:
    module = randomise(experts_of(new_model().to(torch.bfloat16)))
    sums = module(rows([0, 1, 2]))
    sums.sum().backward()
    exact = randomise(experts_of(new_model().to(torch.bfloat16).float()))
    exact(rows([0, 1, 2])).sum().backward()
    assert sums.dtype == torch.float32
    for name in NAMES:
        got, want = module.bank.flat(name).grad, exact.bank.flat(name).grad
        assert got.dtype == torch.float32
        assert float((got - want).norm() / want.norm()) < 5e-2


# gates


def test_gate_is_half_at_step_zero_and_moves_only_if_b_is_not_zero(new_model, mixed) -> None:
    model = new_model()
    batch = rows([0, 1, 2, 3])
    module = TrainableGates(model, mixed, inputs)
    sums = module(batch)
    sums.sum().backward()
    assert all(module.bank.flat(n).grad.abs().max() > 0 for n in mixed.names)
    uninstall(model)
    half = [
        dataclasses.replace(
            e,
            gates=None,
            adapters={s: dataclasses.replace(a, scale=a.scale / 2) for s, a in e.adapters.items()},
        )
        for e in mixed
    ]
    from quietgoose.routing.library import ExpertLibrary

    attach(model, ExpertLibrary(half), "oracle")
    with assign_rows(model, [0, 1, 2, 3]):
        want = row_losses(model, batch)
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-4)
    silent = [
        dataclasses.replace(
            e,
            adapters={s: dataclasses.replace(a, b_OR=torch.zeros_like(a.b_OR)) for s, a in e.adapters.items()},
        )
        for e in mixed
    ]
    quiet = TrainableGates(new_model(), ExpertLibrary(silent), inputs)
    quiet(batch).sum().backward()
    assert all(quiet.bank.flat(n).grad.abs().max() == 0 for n in mixed.names)


def test_gate_training_moves_gates_only_and_equals_separate_runs(new_model, mixed) -> None:
    model = new_model()
    module = TrainableGates(model, mixed, inputs)
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trainable == [f"bank.flat_{name}" for name in mixed.names]
    assert not model.get_submodule("model.layers.0.mlp.gate_proj").weight.requires_grad
    frozen = {n: p for n, p in module.named_parameters() if not p.requires_grad}
    before = (
        sha256_tensors(frozen),
        [e.tensor_hash() for e in mixed],
        sha256_tensors({"bank": module.frozen_NP}),
    )
    batches = [rows([3, 0, 1, 2, 1, 3], seed=s) for s in range(3)]
    trained = train(module, batches, lr=5e-3)
    assert before == (
        sha256_tensors(frozen), [e.tensor_hash() for e in mixed], sha256_tensors({"bank": module.frozen_NP})
    )  # fmt: skip
    gates = module.gates(trained)
    for e, name in enumerate(mixed.names):
        alone = TrainableGates(new_model(), mixed.restrict([name]), inputs)
        want = alone.gates(train(alone, [only(b, e) for b in batches], lr=5e-3))[name]
        assert set(want) == set(mixed[name].adapters)
        for site, vector in want.items():
            torch.testing.assert_close(gates[name][site], vector, rtol=1e-4, atol=1e-6)
    gated = module.library(trained)
    uninstall(model)
    attach(model, gated, "phatgoose")
    assert torch.isfinite(model(batches[0].tokens_BT).logits).all()


def test_gate_gradient_equals_the_formula(new_model, new_expert) -> None:
    """dv = sum_t dg g (1 - g) x with dg = s q . h, in fp64 at one site (phatgoose.md 1.2)."""
    model = new_model().double()
    from quietgoose.routing.library import ExpertLibrary

    site = "model.layers.1.mlp.down_proj"
    expert = new_expert(model, "ant", targets=(site,))
    module = TrainableGates(model, ExpertLibrary([expert]), inputs).double()
    v = torch.randn(40, dtype=torch.float64) * 0.1
    module.bank.flat("ant").data.copy_(v)
    seen = {}

    def hook(m, arguments, output) -> None:
        seen["x"] = arguments[0].detach()[0]
        output.register_hook(lambda grad: seen.update(dy=grad[0]))

    model.get_submodule(site).register_forward_hook(hook)
    module(rows([0])).sum().backward()
    adapter = expert.adapters[site]
    h, q = seen["x"] @ adapter.a_RI.t().double(), seen["dy"] @ adapter.b_OR.double()
    g = torch.sigmoid(seen["x"] @ v)
    dg = adapter.scale * (q * h).sum(1)
    want = ((dg * g * (1 - g))[:, None] * seen["x"]).sum(0)
    torch.testing.assert_close(module.bank.flat("ant").grad, want, rtol=1e-9, atol=1e-12)


def test_gates_without_data_are_refused(new_model, equal) -> None:
    module = TrainableGates(new_model(), equal, inputs)
    trained = train(module, [rows([0, 1, 2, 0])])
    with pytest.raises(ArtifactError, match=r"EXP-003.*dog.*zero"):
        module.library(trained)


def test_initial_numbers_are_pefts_and_each_experts_own(new_model) -> None:
    module = experts_of(new_model())
    ant, bee = (module.bank.layout.unflatten(module.bank.flat(n).detach()) for n in ("ant", "bee"))
    for site, (a, b) in ant.items():
        bound = a.shape[1] ** -0.5
        assert float(b.abs().max()) == 0
        assert 0.8 * bound < float(a.abs().max()) <= bound
        assert not torch.equal(a, bee[site][0])
    first, second = list(ant.values())[:2]
    assert not torch.equal(first[0], second[0])
    layer = peft.tuners.lora.Linear(torch.nn.Linear(24, 24), "default", peft.LoraConfig(r=256), r=256, lora_alpha=1)
    theirs = layer.lora_A["default"].weight
    assert float(theirs.detach().abs().max()) == pytest.approx(24**-0.5, rel=1e-2)
