"""Adam's moments (Kingma & Ba 2015). torch's own class imports torch's compiler: 126 MB and 1.3 s of every run."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Adam:
    """The parameters that learn, and of each the moments of its gradient, once it had one. `fipo.update` steps."""

    def __init__(self, parameters: Iterable[Tensor], betas: tuple[float, float], epsilon: float = 1e-8) -> None:
        self.parameters = list(parameters)
        self.betas, self.epsilon = betas, epsilon
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Its `step`, 0-d, `exp_avg` and `exp_avg_sq`; zeros at first."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def step(self, learned: Sequence[Tensor], learning_rate: float, divisor: Tensor) -> None:
        """One step of those, their gradients divided by a number, by torch's fused kernel."""
        states = [self.moments(parameter) for parameter in learned]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        settings = {"lr": learning_rate, "beta1": self.betas[0], "beta2": self.betas[1], "eps": self.epsilon}
        settings |= {"weight_decay": 0.0, "amsgrad": False, "maximize": False, "grad_scale": divisor}
        torch._fused_adam_(list(learned), [weight.grad for weight in learned], means, squares, [], steps, **settings)
