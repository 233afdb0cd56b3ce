"""Mistakes in arguments, told where something is made."""

import torch
from mistakes import X, Y, argument
from simple import Lit, Net, greedy
from torch import nn

from lightning_local import (
    EarlyExit,
    LocalLearner,
    LocalParallelStrategy,
    Partition,
    heads,
    losses,
    methods,
    plan_partition,
)
from lightning_local.methods import LocalMethod

argument("module", lambda: greedy(Net()), "got a Net", "pass a", kind=TypeError)
argument("method", lambda: LocalLearner(Lit(), "auglocl"), "'auglocl'", "Did you mean 'AugLocal'")
argument("method type", lambda: LocalLearner(Lit(), 3), "3", "pass one of", kind=TypeError)
argument("one module", lambda: LocalLearner(Lit(), "EndToEnd", 2), "partition=2", "leave partition")
argument("partition", lambda: LocalLearner(Lit(), "SGR", "blocks"), "'blocks'", "pass 'units'")
argument("no request", lambda: greedy(Lit(), partition=None), "None", "'units'", kind=TypeError)
argument("no module", lambda: LocalLearner(Lit(), "SGR", 0), "num_modules=0", "pass a positive int")
argument("both", lambda: Partition(2, ["a"]), "both num_modules and", "pass one of the two")
argument("twice", lambda: Partition(split_points=["a", "a"]), "'a'", "once is enough")
argument("text", lambda: Partition(split_points="a"), "'a'", "pass a list", kind=TypeError)
argument("granularity", lambda: Partition(granularity="all"), "'all'", "'finest'")
argument("balance", lambda: Partition(balance="time"), "balance='time'", "needs num_modules")
argument("name", lambda: greedy(Lit(), partition=["stm"]), "`stm`", "closest names are: stem")
argument("features", lambda: greedy(Lit(), out_features=0), "out_features=0", "1 or more")
argument(
    "schedule", lambda: greedy(Lit(), lr_scheduler=print), "lr_scheduler", "pass both, or neither"
)
SGD = torch.optim.SGD(Net().parameters(), 0.1)
STEP_LR = torch.optim.lr_scheduler.StepLR(SGD, 1)
argument(
    "made optimizer",
    lambda: greedy(Lit(), optimizer=SGD),
    *("optimizer=...) got SGD, made already", "lambda parameters: torch.optim.SGD(parameters"),
    kind=TypeError,
)
argument(
    "made scheduler",
    lambda: greedy(Lit(), optimizer=torch.optim.SGD, lr_scheduler=STEP_LR),
    *("lr_scheduler=...) got StepLR, made already", "lambda optimizer: torch"),
    kind=TypeError,
)
argument(
    "class of a criterion",
    lambda: greedy(Lit(), criterion=nn.CrossEntropyLoss),
    *("the class CrossEntropyLoss", "pass an instance, CrossEntropyLoss()"),
    kind=TypeError,
)
argument(
    "name of a criterion",
    lambda: greedy(Lit(), criterion="mse"),
    *("criterion=...) got 'mse'", "torch.nn.MSELoss()"),
    kind=TypeError,
)
argument(
    "names of keys",
    lambda: greedy(Lit(), unpack="image,label"),
    *("unpack=...) got 'image,label'", "(input, target)", "lambda batch: (batch['image']"),
    kind=TypeError,
)
argument(
    "learner",
    lambda: greedy(greedy(Lit())),
    *("got a LocalLearner", "a learner already", "learner.module"),
    kind=TypeError,
)
argument(
    "name from outside",
    lambda: greedy(Lit(), partition=["network.blocks.1"]),
    *("`network.blocks.1`", "`network` (Net)", "relative to that", "pass 'blocks.1'"),
)
argument(
    "recompute", lambda: greedy(Lit(), recompute="all"), "'all'", "'blocks'", "list of indices"
)
argument(
    "mode", lambda: greedy(Lit(), recompute={0: "all"}), "'all'", "of local module 0", "'body'"
)
argument("index", lambda: greedy(Lit(), recompute=[-1]), "[-1]", "counted from 0")
argument("kind", lambda: greedy(Lit(), recompute=True), "True", "such as [0, 1]", kind=TypeError)
argument("mode of compile", lambda: greedy(Lit(), compile="fast"), "'fast'", "'reduce-overhead'")
argument("compile", lambda: greedy(Lit(), compile=3), "3", "True, False or one", kind=TypeError)
argument("network", lambda: greedy(Lit(), network="net"), "'net'", "pass one of 'network'")
argument("depth", lambda: heads.Augmented(depth=-1), "depth=-1", "0 or more")
argument("widen", lambda: heads.Conv(widen=0), "widen=0", "above 0")
argument("bias", lambda: heads.MLP(bias="no"), "bias='no'", "True or False")
argument("zero", lambda: heads.Linear(zero_init=1), "zero_init=1", "True or False")
argument("beta", lambda: methods.PredSim(beta=2), "beta=2", "0 to 1")
argument("distance", lambda: methods.SGR(distance="l1"), "distance='l1'", "'squared_l2'")
argument("length", lambda: methods.BackLink(length=-1), "length=-1", "None", "0 or more")
argument("statistics", lambda: losses.InfoPro(([0.5], [0.0])), "standard deviations")
argument(
    "lists", lambda: losses.InfoPro(([0.5], [0.5, 0.5])), "two lists of one number per channel"
)
argument("weights", lambda: losses.InfoPro(([0.5], [0.5]), lam_first=5), "lam_first", "two numbers")
argument("needed", lambda: LocalLearner(Lit(), "InfoPro"), "pass methods.InfoPro(denormalize=")
argument("pieces", lambda: LocalMethod(heads.Linear), "head", "heads.", kind=TypeError)
argument("threshold", lambda: EarlyExit(1.5), "threshold=1.5", "0 to 1")
argument("stages", lambda: LocalParallelStrategy(num_stages=0), "num_stages=0")
argument(
    "order", lambda: LocalParallelStrategy(placement=[0, 2]), "[0, 2]", "in order", "[0, 0, 1]"
)
argument("places", lambda: LocalParallelStrategy(placement="01"), "'01'", "list", kind=TypeError)
argument(
    "backend",
    lambda: LocalParallelStrategy(process_group_backend="mpi"),
    *("'mpi'", "expected 'nccl'"),
)
argument("budget", lambda: plan_partition(greedy(Lit()), (X, Y), memory="much"), "'much'", "'8GiB'")
argument("example", lambda: plan_partition(greedy(Lit())), "pass a batch", "example_input_array")
