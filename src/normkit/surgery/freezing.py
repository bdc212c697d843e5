"""The verbs `freeze` and `unfreeze`, and `param_groups`: what of the norm layers is trained."""

from __future__ import annotations

from typing import Any

from normkit.core.constraints import Flag, Real, check
from normkit.errors import NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.protocol import states

__all__ = ["freeze", "param_groups", "unfreeze"]


def freeze(model: Any, *, affine: bool = True) -> Any:
    """Freeze every norm layer of a model, in place: it evaluates by its kept statistics, and keeps them, in training.

    y = (x - running_mean) / sqrt(running_var + eps) * gamma + beta, in training mode as in evaluation mode, with
    gradients to the input. Norms without kept statistics (layer, group, RMS norm) go on as they are, with `affine`
    their gamma and beta are frozen as well; a batch norm without running statistics goes on using its batch.

    PyTorch: a frozen layer is in evaluation mode and stays there, whatever `model.train()` asks for, as do its copies,
    its pickles and what `torch.save` wrote of the whole model. It ignores `reset_running_stats`, so that
    `torch.optim.swa_utils.update_bn` leaves it alone. Class, names, hooks and `state_dict` stay what they are.
    Gradients that gamma and beta have got are dropped, since an optimizer moves what has a gradient.

    Keras: `trainable=False` on the norm layers, which there means inference as well. As after every change of
    `trainable`, a compiled model has to be compiled again. Setting `trainable` of a model around them unfreezes them.

    NNX: `use_running_average` is True whatever `model.train()`, a view or a call says. Gamma and beta are no longer of
    type `nnx.Param`; make the optimizer after that.

    Args:
        model: a torch.nn.Module, a Keras model or an nnx.Module, or a part of one: `normkit.freeze(model.backbone)`.
        affine: freeze gamma and beta, too. False leaves them as they are, and norms without kept statistics alone; not
            in Keras.

    Returns:
        The model.

    Raises:
        NormTypeError: for what is no model.
        NormValueError: for a model without norm layers that could be frozen; for lazy layers; for `affine=False` in
            Keras.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        >>> y = normkit.freeze(model).train()(torch.randn(8, 3))
        >>> model[1].running_mean, [name for name, p in model.named_parameters() if p.requires_grad]
        (tensor([0., 0., 0., 0.]), ['0.weight', '0.bias'])
    """
    check("freeze", {"affine": Flag()}, {"affine": affine})
    if not states(framework_of(model)).freeze(model, affine):
        must = f"`model` must hold {'norm layers' if affine else 'norm layers with running statistics'} to be frozen"
        raise NormValueError(message(must, type(model).__name__))
    return model


def unfreeze(model: Any) -> Any:
    """Undo `normkit.freeze`, in place: each layer is in the mode that was asked for last, and trains what it trained.

    Layers that were not frozen by `normkit.freeze` stay as they are, and so do parameters that were not trained before.

    Args:
        model: as `normkit.freeze`; a part of what was frozen will do.

    Returns:
        The model.

    Raises:
        NormTypeError: for what is no model.

    Example:
        >>> import normkit, torch
        >>> model = normkit.freeze(torch.nn.Sequential(torch.nn.BatchNorm1d(4)))
        >>> normkit.unfreeze(model)[0].training
        True
    """
    states(framework_of(model)).unfreeze(model)
    return model


def param_groups(model: Any, weight_decay: float, *, biases: bool = False) -> Any:
    """Return the trainable parameters in groups: with weight decay, and without (gamma and beta of norms, biases).

    Each trainable parameter is in one group, once, also where modules share it; frozen ones are in none. Norms are the
    known classes and their subclasses, and modules that have `norm` in the name of their class and nothing but vectors
    as parameters of their own. A parameter shared with a norm is not decayed. In PyTorch, what is behind a parametrized
    tensor counts as that tensor; lengths of weight norm, gains of scaled weight standardization and the scalar of
    SkipInit are gains as gamma is, and not decayed.

    Args:
        model: a torch.nn.Module, a built Keras model or an nnx.Module.
        weight_decay: of everything else.
        biases: decay biases, too (vectors with `bias` in their name); those of norms never.

    Returns:
        PyTorch: groups for an optimizer, `torch.optim.AdamW(normkit.param_groups(model, 0.05), lr=1e-3)`.

        Keras, whose optimizers have no groups: the same list; give the last group to the optimizer,
        `optimizer.exclude_from_weight_decay(var_list=groups[-1]["params"])`, before its first step.

        NNX: a function from parameters, `nnx.state(model, nnx.Param)`, to the weight decay of each. It is a mask, since
        0 is false: `optax.adamw(lr, weight_decay=0.05, mask=normkit.param_groups(model, 0.05))`.

    Raises:
        NormTypeError: for what is no model.
        NormValueError: for a negative `weight_decay`, for lazy layers and models that are not built.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> optimizer = torch.optim.AdamW(normkit.param_groups(model, 0.05), lr=1e-3)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.05, 1), (0.0, 3)]
    """
    check(
        "param_groups", {"weight_decay": Real(0.0), "biases": Flag()}, {"weight_decay": weight_decay, "biases": biases}
    )
    return states(framework_of(model)).grouped(model, float(weight_decay), biases)
