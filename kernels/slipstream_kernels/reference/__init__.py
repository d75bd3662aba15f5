"""Floor 2. Every op in plain PyTorch: the definition that backends, tests and benchmarks compare with.

Arguments are already checked by the public ops. Computation is in float32, or float64 for float64
inputs. (The definition of checksum64 needs no torch and stands in checksum.py.)
"""

from slipstream_kernels.reference.advantage import group_advantage as group_advantage
from slipstream_kernels.reference.advantage import segment_scan as segment_scan
from slipstream_kernels.reference.advantage import whiten as whiten
from slipstream_kernels.reference.kl import Direction as Direction
from slipstream_kernels.reference.kl import KlSettings as KlSettings
from slipstream_kernels.reference.kl import linear_kl as linear_kl
from slipstream_kernels.reference.linear import LogitSettings as LogitSettings
from slipstream_kernels.reference.linear import linear_logprob as linear_logprob
from slipstream_kernels.reference.policy import PolicyInputs as PolicyInputs
from slipstream_kernels.reference.policy import normalizer as normalizer
from slipstream_kernels.reference.policy import policy_loss as policy_loss
from slipstream_kernels.reference.policy import policy_terms as policy_terms
from slipstream_kernels.reference.policy import token_shares as token_shares
from slipstream_kernels.reference.surrogate import MAX_LOG_RATIO as MAX_LOG_RATIO
from slipstream_kernels.reference.surrogate import segment_ids as segment_ids
