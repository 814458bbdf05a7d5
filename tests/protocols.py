"""The protocols' keys as they stand in reports and manifests, and the rules behind them."""

from soft_jax.config import Config
from soft_jax.inference import rules

NO_TASK_ID = "per_sample/no_task_id"
PER_SAMPLE = "per_sample/prompt_id"
PER_SAMPLE_GRADIENT = "per_sample/gradient_id"
PROTOTYPE = "per_sample/prototype"
VOTE_POOL = "batch_vote/pool"
VOTE_PROMPT = "batch_vote/prompt_id"
ORACLE = "oracle/task_given"
FROZEN = "per_sample/frozen_features"
FROZEN_GIVEN = "oracle/frozen_features"


def rules_for(method, shots=(), features=0):
    """The rules that apply to a method, with `features` of prototypes; without shots, no vote by
    gradients.
    """
    config = Config(seed=0, prototype_features=features, shots=shots or (7,))
    applying = rules.rules_of(method, config)
    return tuple(rule for rule in applying if shots or not isinstance(rule, rules.GradientVote))


def keys_of(method, shots=(), features=0):
    return tuple(rule.key for rule in rules_for(method, shots, features))
