"""slkernels.nn.cached_weights: the same gradients from one W a step, and no stale W."""

import pytest
import slkernels
import torch
from slkernels.nn import SLLinear, cached_weights
from torch import Tensor, nn

M, N, RANK = 24, 40, 5


def model(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"bias": bias, "path": "compose", "dtype": dtype}
    layers = nn.Sequential(
        SLLinear(M, N, RANK, 0.1, 4.0, seed=1, **options), nn.ReLU(), SLLinear(N, M, RANK, 0.2, 4.0, seed=2, **options)
    )
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.lora_B)
    return layers


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 9, M, generator=generator).to(dtype) for _ in range(3)]


def step(net: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    results = []
    for x in xs:
        x = x.clone().requires_grad_()
        y = net(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad]
    return results


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters()]


def count_composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts W's that SLLinear.weight composes."""
    count = [0]
    original = SLLinear.weight.fget

    def weight(self):
        count[0] += 1
        return original(self)

    monkeypatch.setattr(SLLinear, "weight", property(weight))
    return count


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_results_and_gradients_over_micro_batches(accumulate: bool, bias: bool, monkeypatch) -> None:
    want, got = model(bias=bias), model(bias=bias)
    results = step(want, batches())
    count = count_composed(monkeypatch)
    with cached_weights(got, accumulate):
        torch.testing.assert_close(step(got, batches()), results)
    torch.testing.assert_close(gradients(got), gradients(want))
    assert count == [2]  # one W a layer
    with cached_weights(got, accumulate):  # gradients add up over contexts, too
        step(got, batches())
    torch.testing.assert_close(gradients(got), [2 * g for g in gradients(want)])


@pytest.mark.parametrize("accumulate", [False, True])
def test_training_is_what_it_is_without(accumulate: bool) -> None:
    want, got = model(torch.float32), model(torch.float32)
    for net, cached in ((want, False), (got, True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            if cached:
                with cached_weights(net, accumulate):
                    step(net, batches(torch.float32))
            else:
                step(net, batches(torch.float32))
            optimizer.step()
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", ["sgd", "slkernels", "in_place", "data", "load", "to"])
def test_changed_parameters_give_a_new_weight(change: str) -> None:
    net, x = model(torch.float32), batches(torch.float32)[0]
    with cached_weights(net):
        before = net(x)
        before.sum().backward()
        with torch.no_grad():
            match change:
                case "sgd":
                    torch.optim.SGD(net.parameters(), lr=0.1).step()
                case "slkernels":
                    slkernels.optim.AdamW8bit(net.parameters(), lr=0.1).step()
                case "in_place":
                    net[0].values.mul_(2)
                case "data":
                    net[0].lora_A.data = net[0].lora_A.data * 2
                case "load":
                    net.load_state_dict({k: 2 * v if v.is_floating_point() else v for k, v in net.state_dict().items()})
                case "to":
                    net, x = net.to(torch.float64), x.to(torch.float64)
        got = net(x)
    assert not torch.equal(got.float(), before)
    torch.testing.assert_close(got, net(x))


def test_accumulation_refuses_parameters_that_change_too_early() -> None:
    net, x = model(torch.float32), batches(torch.float32)[0]
    for change in (lambda: net[0].lora_B.data.mul_(2), lambda: net[0].values.add_(1)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        with (
            pytest.raises(RuntimeError, match=r"leave the context before optimizer.step\(\)"),
            cached_weights(net, True),
        ):
            net(x).sum().backward()
            with torch.no_grad():
                change()
            optimizer.step()  # the first change is seen by this alone
            net(x)
        assert all(p.grad is None for name, p in net.named_parameters() if "bias" not in name)


def test_accumulation_refuses_backward_after_the_context() -> None:
    net, x = model(torch.float32), batches(torch.float32)[0]
    with cached_weights(net, True):
        y = net(x)
    with pytest.raises(RuntimeError, match="run both within the context"):
        y.sum().backward()


def test_without_accumulation_backward_may_follow_the_context() -> None:
    want, got = model(), model()
    with cached_weights(got):
        y = got(batches()[0])
    y.square().sum().backward()
    want(batches()[0]).square().sum().backward()
    torch.testing.assert_close(gradients(got), gradients(want))


@pytest.mark.parametrize("accumulate", [False, True])
def test_nothing_is_kept_after_the_context(accumulate: bool) -> None:
    net, x = model(), batches()[0]
    with pytest.raises(ZeroDivisionError), cached_weights(net, accumulate):
        net(x).sum().backward()
        raise ZeroDivisionError
    assert all(layer._cache is None for layer in net if isinstance(layer, SLLinear))
    if accumulate:
        assert net[0].lora_A.grad is None  # the sum was dropped
    want = net(x)
    with cached_weights(net, accumulate):
        with torch.inference_mode():
            torch.testing.assert_close(net(x), want)
        torch.testing.assert_close(net(x[0, 0]), want[0, 0])  # a vector, and W of an inference serves training
        net(x[0, 0]).sum().backward()


def test_frozen_layers_and_some_frozen_parameters() -> None:
    for names in (("lora_A",), ("values", "lora_B"), ("lora_A", "lora_B", "values")):
        want, got = model(), model()
        for net in (want, got):
            for name in names:
                getattr(net[0], name).requires_grad_(False)
        step(want, batches())
        with cached_weights(got, True):
            step(got, batches())
        torch.testing.assert_close(gradients(got), gradients(want))


def test_compiled_layers_compose_as_without() -> None:
    net, x = model(torch.float32), batches(torch.float32)[0]
    want = net(x)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with cached_weights(net):
        torch.testing.assert_close(compiled(x), want)
