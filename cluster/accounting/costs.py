"""What a prefill token and a decode token cost, learned from measured intervals. Pure."""

from dataclasses import dataclass

FORGETTING = 0.995
"""Weight of an interval against the next one with work; 200 intervals of 2 s are 7 minutes."""
IDLE_SHARE = 0.1
"""How much one interval without work moves the idle power."""
RIDGE = 1e-4
"""Pull of the two costs towards each other, as a share of what was seen. It decides where the
intervals cannot: only one kind of token was there, or both always in one proportion."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that an engine computed."""

    prefill: float = 0.0
    """Prompt tokens that no cache held."""
    decode: float = 0.0


class TokenCosts:
    """Least squares with forgetting: effort - idle = prefill_cost * prefill + decode_cost * decode.

    Both costs are at least 0. The unit is that of the effort (joules; CPU seconds where no energy
    is measured); until something was learned, each token counts 1 and ``known`` is False.
    """

    def __init__(self) -> None:
        self.prefill_cost = 1.0
        self.decode_cost = 1.0
        self.idle_power = 0.0
        """Effort for each second without work."""
        self.known = False
        self._pp = self._pd = self._dd = self._py = self._dy = 0.0

    def learn(self, seconds: float, work: Work, effort: float) -> None:
        """Take in one interval: its length, the tokens computed in it and what it took."""
        p, d = work.prefill, work.decode
        if not (p or d):
            if seconds > 0:
                self.idle_power += IDLE_SHARE * (effort / seconds - self.idle_power)
            return
        y = max(0.0, effort - self.idle_power * seconds)
        self._pp = FORGETTING * self._pp + p * p
        self._pd = FORGETTING * self._pd + p * d
        self._dd = FORGETTING * self._dd + d * d
        self._py = FORGETTING * self._py + p * y
        self._dy = FORGETTING * self._dy + d * y
        self._solve()

    def of(self, work: Work) -> float:
        """The effort that the work takes, without what idling takes."""
        return self.prefill_cost * work.prefill + self.decode_cost * work.decode

    def _solve(self) -> None:
        """Solve the normal equations; a cost that comes out negative is 0, and the other refitted.

        With the ridge they are positive definite wherever a token was seen.
        """
        ridge = RIDGE * (self._pp + self._dd)
        pp, dd, pd = self._pp + ridge, self._dd + ridge, self._pd - ridge
        determinant = pp * dd - pd * pd
        if determinant <= 0:  # the sums have decayed to nothing
            return
        prefill = (self._py * dd - self._dy * pd) / determinant
        decode = (self._dy * pp - self._py * pd) / determinant
        if prefill < 0:
            prefill, decode = 0.0, self._dy / dd
        elif decode < 0:
            prefill, decode = self._py / pp, 0.0
        if prefill or decode:
            self.prefill_cost, self.decode_cost, self.known = prefill, decode, True
