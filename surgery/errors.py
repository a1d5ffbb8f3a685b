"""The errors of surgery that are not plain misuse."""


class UnsupportedModel(ValueError):
    """A model that cannot be traced or loaded; the message names the construct and a way out."""


class InfeasibleBudget(ValueError):
    """No plan meets the budget; the message names the reachable limits."""
