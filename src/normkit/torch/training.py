"""Training with PyTorch, as `normkit.experiments.protocol` asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from normkit.errors import NormValueError, message
from normkit.surgery.recalibration import recalibrate
from normkit.surgery.variants import normalized
from normkit.torch import objectives
from normkit.torch.decay import decayed
from normkit.torch.factory import norm_factory
from normkit.torch.landscape import TorchSurface, vectors
from normkit.torch.models import build, weighted_layers
from normkit.torch.probe import as_tensors, check_sized, forward, probe, untouched
from normkit.torch.sequences import RowLSTM, batch_statistics

if TYPE_CHECKING:
    from normkit.experiments.protocol import Batch, BatchStatistics, Scores, Setup, SiteValues, Vector

__all__ = [
    "TorchTrainer",
    "limit_threads",
    "no_training",
    "norm_factory",
    "probe",
    "remarks",
    "seed",
    "trainer",
    "versions",
]


class TorchTrainer:
    """A network in training; see :class:`normkit.experiments.protocol.Trainer`."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: str | Callable[..., Any],
        metric: str | Callable[..., Any],
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self._loss, self._metric = loss, metric

    def step(self, x: Any, y: Any) -> float:
        """One update on a batch, in training mode. Returns the mean loss before it.

        Raises NormValueError where outputs and targets do not fit the loss, and for a batch of one sample in a network
        with batch norm.
        """
        self.network.train()
        loss = objectives.mean_loss(self._loss, self._outputs(x), as_tensors(y, self.network))
        if not loss.requires_grad:
            must = "the loss must depend on the outputs in a way that has a gradient"
            raise NormValueError(message(must, "a constant", "do not use .item(), .detach() or NumPy in it"))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def prepare(self, x: Any, y: Any) -> None:
        """Nothing: an eager step is not compiled."""

    def evaluate(self, batches: Iterable[Batch], *, as_trained: bool = False) -> Scores:
        """Score batches, in evaluation mode or `as_trained`; changes nothing, buffers included.

        A loss of the user's, which gives means, is averaged with the sizes of the batches; a metric of the user's sees
        all samples at once.
        """
        from normkit.experiments.protocol import Scores

        losses: list[Tensor] = []
        metrics: list[Tensor] = []
        kept: list[tuple[Any, Any]] = []
        with untouched(self.network):
            self.network.train(as_trained)
            for x, y in batches:
                outputs, targets = self._outputs(x), as_tensors(y, self.network)
                if isinstance(self._loss, str):
                    losses.append(objectives.losses(self._loss, outputs, targets))
                else:
                    mean = objectives.mean_loss(self._loss, outputs, targets)
                    losses.append(mean.double().expand(_size(targets)))
                if self._metric == "accuracy":
                    metrics.append(objectives.correct(outputs, targets))
                elif not isinstance(self._metric, str):
                    kept.append((outputs, targets))
        if not losses:
            raise NormValueError(message("there must be batches to score", "none"))
        loss = torch.cat(losses)
        if not isinstance(self._metric, str):
            value = objectives.number(self._metric, *objectives.joined(kept))
            return Scores(loss.mean().item(), value, None)
        examples = loss if self._metric == "loss" else torch.cat(metrics)
        known = self._metric == "accuracy" or isinstance(self._loss, str)
        return Scores(loss.mean().item(), examples.mean().item(), examples.cpu().numpy() if known else None)

    def probe(self, x: Any) -> Sequence[SiteValues]:
        """Every call of an activation in a forward pass in training mode; changes nothing, buffers included."""
        return probe(self.network, x)

    def recalibrate(self, batches: Iterable[Batch]) -> None:
        """Put statistics of all these inputs in the place of running ones, where the network keeps any."""
        if any(name.endswith("running_mean") for name, _ in self.network.named_buffers()):
            recalibrate(self.network, [(as_tensors(x, self.network),) for x, _ in batches])  # inputs may be a tuple

    def statistics(self, batches: Iterable[Batch]) -> Iterator[BatchStatistics]:
        """Those that batch norm takes of each batch of sequences in training mode; changes nothing."""
        assert isinstance(self.network, RowLSTM)  # what conditions on other networks come to is refused before
        return batch_statistics(self.network, (as_tensors(x, self.network) for x, _ in batches))

    def weights(self) -> dict[str, NDArray[Any]]:
        """A copy of the weights of the dense and convolutional layers, by their order."""
        layers = weighted_layers(self.network)
        return {f"layer {number}": layer.weight.detach().cpu().numpy().copy() for number, layer in enumerate(layers)}

    def layers(self) -> list[Vector]:
        """A copy of the parameters, layer by layer."""
        return vectors(self.network)

    def surface(self, x: Any, y: Any) -> TorchSurface:
        """The loss of this batch as a function of the parameters; using it changes nothing of the network."""
        return TorchSurface(self.network, self._loss, x, y)

    def _outputs(self, x: Any) -> Any:
        try:
            return forward(self.network, as_tensors(x, self.network))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # of torch.nn; our own layers word it themselves
                raise
            must = "batch norm must see at least 2 values per channel in training"
            hint = "drop_last=True in the DataLoader, a larger batch, or another norm"
            raise NormValueError(message(must, str(error), hint)) from error


def trainer(setup: Setup) -> TorchTrainer:
    """A network with weights drawn from the seed.

    A function of the user's that takes no `norm` gets the variant's norms by `normkit.insert`, or by `normkit.replace`
    where its network has norms.

    Raises NormValueError where this norm or model makes no sense, and where a function of the user's raises, gives
    something else than it must, does not use the norm it was given, or has no place for `after`.
    """
    if isinstance(setup.model, str):
        network: nn.Module = build(
            setup.model,
            shape=setup.shape,
            classes=setup.classes,
            norm=setup.norm,
            position=setup.position,
            steps=setup.steps,
            seed=setup.seed,
            groups=setup.groups,
            conditions=setup.conditions,
        )
    else:
        network = _built(setup.model, setup)
    if decay := setup.conditions.weight_decay:
        if setup.optimizer != "sgd":
            raise NormValueError(message("`weight_decay` must be asked of the optimizer sgd", str(setup.optimizer)))
        as_rate = setup.conditions.decay_as == "rate"
        optimizer: torch.optim.Optimizer = decayed(network, setup.lr, setup.momentum, decay, as_rate=as_rate)
    else:
        optimizer = objectives.optimizer_for(setup.optimizer, list(network.parameters()), setup.lr, setup.momentum)
    return TorchTrainer(network, optimizer, setup.loss, setup.metric)


def seed(seed: int) -> None:
    """Seed torch's own random numbers."""
    torch.manual_seed(seed)


@contextlib.contextmanager
def no_training(what: str) -> Iterator[None]:
    """Inside, a step of any optimizer raises NormValueError that names the file `what`."""

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        must = f"{what} must not train when it is imported"
        hint = 'put the training under `if __name__ == "__main__":`'
        raise NormValueError(message(must, f"a step of {type(optimizer).__name__}", hint))

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def limit_threads(count: int) -> None:
    """Let this process compute with so many threads."""
    torch.set_num_threads(count)


def versions() -> dict[str, str]:
    """Names and versions of what trains."""
    return {"torch": torch.__version__}


def _built(function: Callable[..., Any], setup: Setup) -> nn.Module:
    from normkit.experiments.code import takes_norm

    name = objectives.named(function)
    given = takes_norm(function, name, "norm(64) is the layer for 64 channels")
    norm = norm_factory(setup.norm, setup.position, setup.steps)
    seed(setup.seed)
    network = objectives.called(function, **({"norm": norm} if given else {}))
    if not isinstance(network, nn.Module):
        got = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
        raise NormValueError(message(f"{name} must return a torch.nn.Module", got, "end it with `return model`"))
    if given:
        norm.check_used(network, name)
    check_sized(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        got = f"{type(network).__name__} without any"
        raise NormValueError(message(f"{name} must return a model that has parameters to train", got))
    if given:
        return network
    norm = norm_factory(setup.norm, "before", setup.steps)
    return normalized(
        network,
        name,
        setup.norm,
        None if setup.norm == "none" else norm,
        lambda record, _: norm(record.shape[0], axis=record.axis),
        position=setup.position,
        example=setup.example,
        inplace=True,
    )


def _size(targets: Any) -> int:
    """Number of samples of a batch, by its targets."""
    if isinstance(targets, Mapping | tuple):
        return _size(next(iter(targets.values() if isinstance(targets, Mapping) else targets)))
    return len(targets)


def remarks(steps: int | None) -> tuple[str, ...]:  # noqa: ARG001  # other frameworks' first statistics last longer
    """What a reader should know of trainings of so many steps: nothing, torch's momentum forgets within a few tens."""
    return ()
