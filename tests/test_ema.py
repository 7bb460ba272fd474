import pytest
import torch
from torch import nn
from sd_nb.train.ema import EMA, decay_at


def network():
    "Weights, running statistics and an integer counter"
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def walk(model, step):
    "Move every weight somewhere else"
    g = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g))
        model[1].running_mean.fill_(step); model[1].num_batches_tracked.fill_(step)


@pytest.mark.parametrize("warmup", [True, False])
def test_fault_29_equals_its_closed_form(warmup):
    "After n updates the average is the weighted sum of everything it has seen"
    model = network(); ema = EMA(model, 0.9, warmup)
    seen, weights = [model[0].weight.detach().clone().double()], [1.0]
    for step in range(20):
        walk(model, step); ema.update(step)
        d = decay_at(step, 0.9, warmup)
        weights = [w * d for w in weights] + [1 - d]; seen.append(model[0].weight.detach().double().clone())
    want = sum(w * s for w, s in zip(weights, seen))
    torch.testing.assert_close(ema.state_dict()["0.weight"].double(), want, rtol=1e-5, atol=1e-6)
    assert abs(sum(weights) - 1) < 1e-12


def test_fault_29_warmup_follows_the_formula():
    "min(decay, (1 + t) / (10 + t)): a tenth at first, `decay` in the end"
    assert decay_at(0) == 0.1 and decay_at(8) == 0.5 and decay_at(10**9) == 0.9999
    assert decay_at(0, warmup=False) == 0.9999
    assert all(decay_at(t) <= decay_at(t + 1) for t in range(1000))


def test_counters_are_copied_and_statistics_averaged():
    "Integers have no average: the live value is taken; float buffers move like weights"
    model = network(); ema = EMA(model, 0.5, warmup=False)
    walk(model, 8); ema.update(0)
    assert ema.state_dict()["1.num_batches_tracked"] == 8 and torch.all(ema.state_dict()["1.running_mean"] == 4)


def test_fault_29_swapped_lends_and_gives_back():
    "Inside, the network is the average; afterwards, also after an exception, it is bitwise what it was"
    model = network(); ema = EMA(model); walk(model, 1); ema.update(0); walk(model, 2)
    live = {k: v.clone() for k, v in model.state_dict().items()}
    average = {k: v.clone() for k, v in ema.state_dict().items()}
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="boom"):
        with ema.swapped() as lent:
            assert lent is model and all(torch.equal(v, average[k]) for k, v in model.state_dict().items())
            raise RuntimeError("boom")
    assert all(torch.equal(v, live[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in ema.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters()))  # the optimizer still holds the right ones


def test_fault_29_misuse_while_swapped_is_refused():
    "Neither a second swap nor an update may touch the lent average"
    model = network(); ema = EMA(model)
    with ema.swapped():
        with pytest.raises(RuntimeError): ema.update(0)
        with pytest.raises(RuntimeError): ema.swapped().__enter__()
    assert not ema.is_swapped


def test_tied_weights_survive_swapping():
    "One tensor under two names comes back as it was"
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]); model[1].weight = model[0].weight
    ema = EMA(model, 0.5, warmup=False)
    with torch.no_grad(): model[0].weight.add_(1)
    live = model[0].weight.clone(); ema.update(0); average = ema.state_dict()["0.weight"].clone()
    for _ in range(2):
        with ema.swapped(): assert torch.equal(model[1].weight, average)
        assert torch.equal(model[0].weight, live) and torch.equal(ema.state_dict()["1.weight"], average)


def test_fault_29_resume_is_bitwise():
    "Saving and loading in the middle changes nothing"
    a, b = network(), network(); one, two = EMA(a), EMA(b)
    for step in range(6):
        walk(a, step); one.update(step); walk(b, step); two.update(step)
        if step == 2: two, old = EMA(b), two.state_dict(); two.load_state_dict({k: v.clone() for k, v in old.items()})
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_another_networks_average_is_refused():
    "Names and shapes must be the network's own"
    ema = EMA(network())
    with pytest.raises(ValueError, match="1.bias"): ema.load_state_dict({k: v for k, v in ema.state_dict().items() if k != "1.bias"})
    with pytest.raises(ValueError, match=r"another network: 0.weight: float32 \(2, 2\) instead of float32 \(4, 3\)"): ema.load_state_dict(ema.state_dict() | {"0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="between 0 and 1"): EMA(network(), 1.5)


def test_the_network_can_load_its_average():
    "The average has the network's names, so that it can be saved as a model"
    model = network(); ema = EMA(model); walk(model, 3); ema.update(0)
    other = network(); other.load_state_dict(ema.state_dict())
    assert torch.equal(other[0].weight, ema.state_dict()["0.weight"])


@pytest.mark.parametrize("k", range(1, 8))
def test_fault_29_an_error_in_the_middle_of_lending_is_undone(k, monkeypatch):
    "Ctrl-C at the k-th tensor, on the way in: weights and average are bitwise what they were, and the next loan works"
    model = network(); ema = EMA(model); walk(model, 1); ema.update(0); walk(model, 2)
    live, average = ({k: v.clone() for k, v in o.state_dict().items()} for o in (model, ema))

    class Interrupted(dict):
        reads = 0
        def __getitem__(self, name):
            self.reads += 1
            if self.reads == k: raise KeyboardInterrupt
            return super().__getitem__(name)

    with monkeypatch.context() as m:
        m.setattr(ema, "shadow", Interrupted(ema.shadow))
        with pytest.raises(KeyboardInterrupt):
            with ema.swapped(): pytest.fail("lent")
    assert all(torch.equal(v, live[name]) for name, v in model.state_dict().items()) and not ema.is_swapped
    assert all(torch.equal(v, average[name]) for name, v in ema.state_dict().items())
    with ema.swapped(): assert all(torch.equal(v, average[name]) for name, v in model.state_dict().items())


def test_fault_29_the_average_can_be_saved_while_it_is_lent():
    "What `state_dict` hands out is the average, also in the middle of a validation"
    model = network(); ema = EMA(model); walk(model, 1); ema.update(0)
    average = {k: v.clone() for k, v in ema.state_dict().items()}
    with ema.swapped(): assert all(torch.equal(v, average[k]) for k, v in ema.state_dict().items())


def test_fault_29_never_stepped_and_stepped():
    "Before the first update the average is the network; after it, it is another"
    model = network(); ema = EMA(model)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in ema.state_dict().items())
    with ema.swapped(): assert torch.equal(model[0].weight, ema.state_dict()["0.weight"])
    walk(model, 1); ema.update(0)
    assert not torch.equal(ema.state_dict()["0.weight"], model[0].weight)


def test_what_does_not_fit_is_listed_in_one_line():
    "Types and numbers that are none are told like names and shapes, five at most"
    ema = EMA(network())
    with pytest.raises(ValueError, match="0.bias: float16") as error: ema.load_state_dict(ema.state_dict() | {"0.bias": torch.zeros(4).half()})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="0.bias: NaN"): ema.load_state_dict(ema.state_dict() | {"0.bias": torch.full((4,), torch.nan)})
    with pytest.raises(ValueError, match="and 2 more$"): ema.load_state_dict({})
    assert torch.equal(ema.state_dict()["0.bias"], network()[0].bias)
