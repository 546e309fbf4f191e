"""Optimizers that a run cannot use, each with the reason.

Each process updates only the parameters that it owns. An optimizer whose update of a parameter depends on the others would
give another result on another layout of processes. `tests/utils/optim/test_independence.py` runs every allowed optimizer
once over all parameters and once over parts of them, and compares the bits.
"""

from __future__ import annotations

_CLOSURE = "it evaluates the network several times per step"
_MODEL = "it needs the whole network in one process"
_HESSIAN = "it needs second derivatives of the loss"
_DISTANCE = "its step size depends on all parameters together; use Prodigy"
_COUPLED = "its update of a parameter depends on the other parameters, and so on the layout of the processes"
_RANDOM = "it draws random numbers in the order of the parameters, and so depends on the layout of the processes"
_STATE = "its state cannot be saved by parameter, so no run could resume exactly"
_SHAPES = "it fails on weights of a convolution"
_COMMUNICATION = "it communicates between processes by itself"

REFUSED = {
    "torch.optim": {"LBFGS": _CLOSURE, "SparseAdam": "it accepts sparse gradients only"},
    "schedulefree": dict.fromkeys(
        ("AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"), _CLOSURE
    ),
    "bitsandbytes": {
        **dict.fromkeys(("AdEMAMix32bit", "PagedAdEMAMix32bit"), _SHAPES),
        "PytorchLARS": "it fails in its first step",
    },
    "torchao": {"CPUOffloadOptimizer": "it needs another optimizer as an argument, and a GPU"},
    "pytorch_optimizer": {
        **dict.fromkeys(("lbfgs", "alig", "bsam"), _CLOSURE),
        **dict.fromkeys(("adammini", "lomo", "adalomo", "muonclip"), _MODEL),
        **dict.fromkeys(("adahessian", "sophiah"), _HESSIAN),
        **dict.fromkeys(("dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "dadaptsgd", "prodigy"), _DISTANCE),
        **dict.fromkeys(("adagc", "adai", "adams", "asgd", "avagrad", "dash", "ranger21"), _COUPLED),
        **dict.fromkeys(("alice", "apollo", "galore", "gravity", "kron", "magma", "racs", "sara", "spam"), _RANDOM),
        **dict.fromkeys(("demo", "distributedmuon"), _COMMUNICATION),
        **dict.fromkeys(("adashift", "aggmo", "conda", "madgrad", "scalableshampoo", "splus", "stablespam"), _STATE),
        "lorarite": "it needs pairs of LoRA matrices",
        "spectralsphere": "it accepts matrices only",
        "shampoo": "it takes seconds for a matrix of ordinary size; use soap",
    },
}
"""Package -> name of the optimizer there -> reason."""

OTHER_NAMES = {
    "dadaptadam": _DISTANCE,
    "dadaptation": _DISTANCE,
    "dadaptadampreprint": _DISTANCE,
    "dadaptlion": _DISTANCE,
    "dadaptsgd": _DISTANCE,
    "dadaptadagrad": _DISTANCE,
    "dadaptadan": _DISTANCE,
    "dadaptadanip": _DISTANCE,
}
"""Names that other trainers use for them."""
