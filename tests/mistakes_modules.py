"""Mistakes in modules, where their networks are cut, and in optimizers."""

import lightning as L
import torch
from mistakes import case, fitted
from simple import Lit, Net, greedy
from torch import nn
from torch.nn import functional

from lightning_local import LocalLearner, methods


@case(["network='network' or 'other'"])
def two_networks():
    class Two(Lit):
        def __init__(self):
            super().__init__()
            self.other = Net()

    greedy(Two())


class Parts(L.LightningModule):
    """Layers, and a step that calls them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(), Net()

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.first(batch[0]) + self.second(batch[0]), batch[1])


@case(["network='first' or 'second'", "define forward", "pass network='.' to cut it"])
def two_networks_and_no_forward():
    greedy(Parts())


@case(["network='.' cuts the forward of Parts", "defines none", "'first', 'second'"])
def a_forward_that_is_not_there():
    greedy(Parts(), network=".")


@case(["automatic_optimization = False", "wrap a module with automatic"])
def manual_optimization():
    class Manual(Lit):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    greedy(Manual())


@case(["overrides optimizer_step"])
def own_optimizer_step():
    class Steps(Lit):
        def optimizer_step(self, *args, **kwargs):
            pass

    greedy(Steps())


@case(["has no parameters", "pass network="])
def no_parameters():
    class Empty(Lit):
        def __init__(self):
            super().__init__(nn.Flatten())
            self.scale = nn.Parameter(torch.ones(()))

    fitted(greedy(Empty(), network="network"))


@case(["asks for 9 local modules", "has 4 units", "at most 4"])
def too_many_modules():
    fitted(greedy(Lit(), partition=9))


@case(["['blocks', 'stem']", "not in the order", "pass ['stem', 'blocks']"])
def split_points_out_of_order():
    fitted(greedy(Lit(), partition=["blocks", "stem"]))


@case(["Nothing follows split point `fc`", "leave it out"])
def a_split_point_at_the_end():
    fitted(greedy(Lit(), partition=["stem", "fc"]))


@case(["last 4 units", "4 units", "a depth of at most"])
def a_head_deeper_than_the_network():
    fitted(LocalLearner(Lit(), methods.AugLocal(depth=3)))


@case(["weight` is used on both sides of a cut", "Untie it"])
def tied_weights():
    net = Net()
    net.blocks[2].conv.weight = net.blocks[0].conv.weight
    fitted(greedy(Lit(net)))


@case(["recompute names local module 7", "from 0 to 3"])
def recompute_beyond_the_last():
    fitted(greedy(Lit(), recompute=[7]))


@case(["returned None", "return an optimizer"])
def no_optimizer():
    class None_(Lit):
        def configure_optimizers(self):
            return None

    fitted(greedy(None_()))


@case(["returned 2 optimizers", "Return one"])
def two_optimizers():
    class Several(Lit):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    fitted(greedy(Several()))


@case(["LBFGS", "use another optimizer"])
def an_optimizer_with_a_closure():
    class Closure(Lit):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    fitted(greedy(Closure()))


@case(["left out 1 of the", "local module 0", "requires_grad_(False)"])
def an_optimizer_that_drops_parameters():
    fitted(greedy(Lit(), optimizer=lambda params: torch.optim.SGD(list(params)[1:], 0.1)))


@case(["returned a int for local module 0", "torch.optim.Optimizer"])
def a_callable_that_makes_no_optimizer():
    fitted(greedy(Lit(), optimizer=lambda params: 3))
