"""Feedback of V on G's RecCoTs (paper Algorithm 1)."""


def reward(p_yes: float, p_no: float, label: int) -> float:
    """`r_ij` (eq. 1): the normalised probability that V gives to what the user did.

    Args:
        p_yes, p_no: `p_ij^T` and `p_ij^F`, normalised over the two answers.
        label: `y_i`, 1 for Yes and 0 for No.

    Raises:
        ValueError: the probabilities do not sum to 1: they are not normalised, or no numbers.
    """
    if not abs(p_yes + p_no - 1) <= 1e-6:  # so written, NaN fails too
        raise ValueError(f"p_yes = {p_yes} and p_no = {p_no} are not normalised over Yes and No")
    return p_yes if label else p_no
