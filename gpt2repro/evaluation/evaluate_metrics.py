"""Our accuracy as a metric of the `evaluate` library, for code that speaks its language.

Apart from it, since importing `evaluate` takes a second.
"""

import evaluate
from datasets import Features, Sequence, Value

from gpt2repro.evaluation.estimates import choices


class MultipleChoiceAccuracy(evaluate.Metric):
    """How often the most likely choice is the right one; the first of equals is taken.

    predictions: log-likelihood of each choice, nats. lengths: of each choice, in the unit that
    `acc_norm` divides by (`acc` does not). references: index of the right choice.

    It is built directly, so that nothing is fetched. `compute(...)` gives `acc` and `acc_norm`, and
    their standard errors as `acc_stderr` and `acc_norm_stderr`. Across processes (`num_process`,
    `process_id`, `experiment_id`, as evaluate has it) the first computes over the examples of all
    and the others get None.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._experiment_id, self._round = self.experiment_id, 0

    def _info(self) -> evaluate.MetricInfo:
        doc = self.__class__.__doc__ or ""
        of_choices = dict.fromkeys(("predictions", "lengths"), Sequence(Value("float64")))
        features = Features({**of_choices, "references": Value("int64")})
        return evaluate.MetricInfo(
            description=doc, citation="", inputs_description=doc, features=features
        )

    def _init_writer(self, timeout: float = 1) -> None:
        # evaluate's processes meet over lock files that the experiment names. In a second round
        # under the same name a fast process slips through the locks of the first round and
        # overwrites what is still being read. A name for each round keeps the rounds apart.
        self.info.experiment_id = f"{self._experiment_id}-{self._round}"
        self._round += 1
        super()._init_writer(timeout)

    def _compute(self, **inputs) -> dict[str, float]:
        found = choices(**inputs)
        values = {name: estimate.value for name, estimate in found.items()}
        return values | {f"{name}_stderr": estimate.stderr for name, estimate in found.items()}
