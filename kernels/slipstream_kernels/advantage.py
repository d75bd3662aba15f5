"""Floor 5. Advantages and returns over packed sequences, all on one affine reverse scan.

Tokens outside the mask (prompts, tool results) are skipped: the step after a sampled token is the next
sampled one. Given turns, a step is a whole turn instead. Nothing here is differentiable.

Dimensions: N packed tokens, M steps (sampled tokens, or turns), S segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream_kernels import reference
from slipstream_kernels.checks import check_cu_seqlens, check_device, check_range, check_shape
from slipstream_kernels.dispatch import Backend, choose
from slipstream_kernels.errors import NativeError
from slipstream_kernels.native_advantage import Estimator, Factors, estimate
from slipstream_kernels.segment_scan import IMPLEMENTED, segment_scan

_ONE_PASS = (Backend.NATIVE, Backend.CUDA)
"""What goes through the tokens once; the others build their steps around segment_scan, as turns do."""


def gae(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float = 1.0,
    gae_lambda: float = 1.0,
    bootstrap_S: Tensor | None = None,
    turns_N: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return generalised advantage estimates and value targets.

        delta_t = r_t + discount V_{t+1} - V_t
        advantage_t = delta_t + discount gae_lambda advantage_{t+1},   target_t = advantage_t + V_t

    values_N, rewards_N, mask_N: [N], where t runs over tokens with mask != 0 and the others are
    ignored, their rewards too; bootstrap_S: [S] value after the last sampled token (0 when None:
    the episode ended). Returns advantage_N and target_N: [N] float32, 0 outside the mask.

    turns_N: [N] integers make t run over turns, the runs of sampled tokens with equal number: the value
    of a turn is that of its first token, its reward the sum of its tokens', and all its tokens get its
    advantage and target. So discount counts turns, and long turns cost nothing. Raises ShapeError and
    BackendError. Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    op = "gae"
    _check_factors(op, discount=discount, gae_lambda=gae_lambda)
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=mask_N.device.type)
    if chosen in _ONE_PASS and turns_N is None:
        factors = Factors(discount=discount, trace_lambda=gae_lambda)
        return _one_pass(
            op, chosen, Estimator.GAE, factors, values_N, rewards_N, mask_N, cu_seqlens, bootstrap_S
        )
    with torch.no_grad():
        steps = _Steps.of(op, mask_N, cu_seqlens, turns_N)
        value, reward = steps.take(op, "values_N", values_N), steps.total(op, "rewards_N", rewards_N)
        delta = reward + discount * steps.following(op, value, bootstrap_S) - value
        advantage = segment_scan(
            torch.full_like(delta, discount * gae_lambda), delta, steps.bounds, backend=chosen
        )
        return steps.spread(advantage), steps.spread(advantage + value)


def td_lambda(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float = 1.0,
    trace_lambda: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Return lambda-returns, the value targets of TD(lambda).

        return_t = r_t + discount ((1 - trace_lambda) V_{t+1} + trace_lambda return_{t+1})

    and both V and return are bootstrap_S after the last sampled token. Arguments as in gae, whose
    target this is. Returns [N] float32, 0 outside the mask. Raises ShapeError and BackendError. Source:
    Sutton and Barto 2018, "Reinforcement Learning", eq. 12.2 and 12.3.
    """
    op = "td_lambda"
    _check_factors(op, discount=discount, trace_lambda=trace_lambda)
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=mask_N.device.type)
    if chosen in _ONE_PASS:
        factors = Factors(discount=discount, trace_lambda=trace_lambda)
        return _one_pass(
            op, chosen, Estimator.TD_LAMBDA, factors, values_N, rewards_N, mask_N, cu_seqlens, bootstrap_S
        )[1]
    with torch.no_grad():
        steps = _Steps.of(op, mask_N, cu_seqlens)
        value, reward = steps.take(op, "values_N", values_N), steps.take(op, "rewards_N", rewards_N)
        after = steps.following(op, value, bootstrap_S)
        # After the last step the bootstrap value stands for the return too, so that it counts whole.
        share = steps.last().to(after) * trace_lambda + (1.0 - trace_lambda)
        return steps.spread(
            segment_scan(
                torch.full_like(reward, discount * trace_lambda),
                reward + discount * share * after,
                steps.bounds,
                backend=chosen,
            )
        )


def vtrace(
    values_N: Tensor,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    log_ratio_N: Tensor,
    discount: float = 1.0,
    gae_lambda: float = 1.0,
    rho_cap: float = 1.0,
    trace_cap: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return V-trace advantages and value targets under importance ratios rho = exp(log_ratio).

        delta_t = min(rho_cap, rho_t) (r_t + discount V_{t+1} - V_t)
        v_t - V_t = delta_t + discount gae_lambda min(trace_cap, rho_t) (v_{t+1} - V_{t+1})
        advantage_t = min(rho_cap, rho_t) (r_t + discount v_{t+1} - V_t)

    log_ratio_N: [N] current minus behavior log-probability; the other arguments are those of gae.
    Returns advantage_N and target_N = v: [N] float32, 0 outside the mask. Raises ShapeError and
    BackendError. Source: Espeholt et al. 2018, arXiv:1802.01561, eq. 1.
    """
    op = "vtrace"
    _check_factors(op, discount=discount, gae_lambda=gae_lambda)
    check_range(op, "rho_cap", rho_cap, 0.0, math.inf)
    check_range(op, "trace_cap", trace_cap, 0.0, math.inf)
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=mask_N.device.type)
    if chosen in _ONE_PASS:
        factors = Factors(discount=discount, trace_lambda=gae_lambda, rho_cap=rho_cap, trace_cap=trace_cap)
        return _one_pass(
            *(op, chosen, Estimator.VTRACE, factors, values_N, rewards_N, mask_N, cu_seqlens, bootstrap_S),
            log_ratio_N,
        )
    with torch.no_grad():
        steps = _Steps.of(op, mask_N, cu_seqlens)
        value, reward = steps.take(op, "values_N", values_N), steps.take(op, "rewards_N", rewards_N)
        ratio = steps.take(op, "log_ratio_N", log_ratio_N).clamp(max=reference.MAX_LOG_RATIO).exp()
        rho, trace = ratio.clamp(max=rho_cap), ratio.clamp(max=trace_cap)
        delta = rho * (reward + discount * steps.following(op, value, bootstrap_S) - value)
        target = value + segment_scan(discount * gae_lambda * trace, delta, steps.bounds, backend=chosen)
        advantage = rho * (reward + discount * steps.following(op, target, bootstrap_S) - value)
        return steps.spread(advantage), steps.spread(target)


def discounted_return(
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    *,
    discount: float = 1.0,
    bootstrap_S: Tensor | None = None,
    backend: Backend | str | None = None,
) -> Tensor:
    """Return discounted returns to go: return_t = r_t + discount return_{t+1}, bootstrap_S at the end.

    Arguments as in gae. Returns [N] float32, 0 outside the mask. Raises ShapeError and
    BackendError.
    """
    op = "discounted_return"
    _check_factors(op, discount=discount)
    chosen = choose(op, backend, implemented=IMPLEMENTED, device=mask_N.device.type)
    if chosen in _ONE_PASS:
        factors = Factors(discount=discount)
        return _one_pass(
            op, chosen, Estimator.RETURN, factors, None, rewards_N, mask_N, cu_seqlens, bootstrap_S
        )[1]
    with torch.no_grad():
        steps = _Steps.of(op, mask_N, cu_seqlens)
        reward = steps.take(op, "rewards_N", rewards_N)
        reward = reward + discount * steps.following(op, torch.zeros_like(reward), bootstrap_S)
        return steps.spread(
            segment_scan(torch.full_like(reward, discount), reward, steps.bounds, backend=chosen)
        )


def _one_pass(
    op: str,
    chosen: Backend,
    estimator: Estimator,
    factors: Factors,
    values_N: Tensor | None,
    rewards_N: Tensor,
    mask_N: Tensor,
    cu_seqlens: Tensor,
    bootstrap_S: Tensor | None,
    log_ratio_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return [N] advantages, or targets again where an estimator has none, and [N] targets."""
    tokens, device = mask_N.numel(), mask_N.device
    bounds = check_cu_seqlens(op, cu_seqlens, tokens, values=False)
    for name, tensor, shape in (
        ("mask_N", mask_N, (tokens,)),
        ("log_ratio_N", log_ratio_N, (tokens,)),
        ("values_N", values_N, (tokens,)),
        ("rewards_N", rewards_N, (tokens,)),
        ("cu_seqlens", bounds, bounds.shape),
        ("bootstrap_S", bootstrap_S, (bounds.numel() - 1,)),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, shape)
            check_device(op, name, tensor, device)
    try:
        advantage_N, target_N = estimate(
            estimator,
            factors,
            values_N=values_N,
            rewards_N=rewards_N,
            log_ratio_N=log_ratio_N,
            bootstrap_S=bootstrap_S,
            mask_N=mask_N,
            cu_seqlens=bounds,
            cuda=chosen is Backend.CUDA,
        )
    except NativeError:
        check_cu_seqlens(op, cu_seqlens, tokens)
        raise
    return target_N if advantage_N is None else advantage_N, target_N


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Steps:
    """The steps of packed segments, moved together; P sampled tokens make M steps."""

    rows: Tensor
    """[P] int64 positions of the sampled tokens in the packed axis."""
    firsts: Tensor
    """[M] int64 positions of the first token of each step."""
    step_of: Tensor
    """[P] int64 step of each sampled token."""
    bounds: Tensor
    """[S + 1] int64 segment bounds over the M steps."""
    tokens: int
    """N."""

    @staticmethod
    def of(op: str, mask_N: Tensor, cu_seqlens: Tensor, turns_N: Tensor | None = None) -> _Steps:
        tokens = mask_N.numel()
        check_shape(op, "mask_N", mask_N, (tokens,))
        bounds = check_cu_seqlens(op, cu_seqlens, tokens)
        sampled = mask_N != 0
        rows = sampled.nonzero()[:, 0]
        begins = torch.ones_like(rows, dtype=torch.bool)
        if turns_N is not None:
            check_shape(op, "turns_N", turns_N, (tokens,))
            segment = torch.searchsorted(bounds, rows, right=True)
            turn = turns_N[rows]
            begins[1:] = (turn[1:] != turn[:-1]) | (segment[1:] != segment[:-1])
        firsts = rows[begins]
        before = torch.nn.functional.pad(
            torch.zeros_like(sampled).index_fill(0, firsts, True).cumsum(0), (1, 0)
        )
        return _Steps(
            rows=rows, firsts=firsts, step_of=begins.cumsum(0) - 1, bounds=before[bounds], tokens=tokens
        )

    def take(self, op: str, name: str, tensor_N: Tensor) -> Tensor:
        """Return [M] float32 values at the first token of each step."""
        check_shape(op, name, tensor_N, (self.tokens,))
        return tensor_N.float()[self.firsts]

    def total(self, op: str, name: str, tensor_N: Tensor) -> Tensor:
        """Return [M] float32 sums over the tokens of each step."""
        check_shape(op, name, tensor_N, (self.tokens,))
        zero = torch.zeros_like(self.firsts, dtype=torch.float64)
        return zero.index_add(0, self.step_of, tensor_N.double()[self.rows]).float()

    def spread(self, values_M: Tensor) -> Tensor:
        """Return [N]: the value of its step at each sampled token, 0 elsewhere."""
        return values_M.new_zeros(self.tokens).index_copy(0, self.rows, values_M[self.step_of])

    def last(self) -> Tensor:
        """Return [M] bool: whether a step is the last of its segment."""
        flags = torch.zeros_like(self.firsts, dtype=torch.bool)
        return flags.index_fill(0, self.bounds[1:][self.bounds.diff() > 0] - 1, True)

    def following(self, op: str, values_M: Tensor, bootstrap_S: Tensor | None) -> Tensor:
        """Return [M]: the value one step later, and the bootstrap value after a segment's last step."""
        shifted = torch.cat([values_M[1:], values_M.new_zeros(1)])[: values_M.numel()]
        filled = self.bounds.diff() > 0
        last = self.bounds[1:][filled] - 1
        if bootstrap_S is None:
            return shifted.index_fill(0, last, 0.0)
        check_shape(op, "bootstrap_S", bootstrap_S, (self.bounds.numel() - 1,))
        return shifted.index_copy(0, last, bootstrap_S.to(values_M)[filled])


def _check_factors(op: str, **factors: float) -> None:
    for name, factor in factors.items():
        check_range(op, name, factor, 0.0, 1.0)
