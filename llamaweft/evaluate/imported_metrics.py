"""Metrics whose code is not ours: of rouge-score and sacrebleu, and of the user's own module.

Nothing is imported before a metric is asked for. D: draws. S: statistics of a row.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from llamaweft.errors import UserError
from llamaweft.evaluate.bootstrap import Parts, Score

Row = Callable[[str, str], Parts]
"""(answer, reference) -> what the row adds."""


class NoNumberError(Exception):
    """A user's metric gave no finite number for a row; the message goes on from its name."""


def rouge(name: str) -> Row:
    """F-measure of `name` (rouge1, rouge2 or rougeL; Lin, 2004) by Google's rouge-score, without
    stemming. Its words are of a-z and 0-9 only. Raises UserError where it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _missing(name, "rouge-score") from None
    scorer = RougeScorer([name], use_stemmer=False)
    return lambda answer, reference: (scorer.score(reference, answer)[name].fmeasure, 1.0)


def corpus_score(name: str) -> tuple[Row, Score]:
    """sacrebleu's bleu (Papineni et al., 2002) or chrf (Popovic, 2015), from 0 to 1, as its
    corpus_bleu and corpus_chrf have it by default: a row's n-gram counts, and the score of summed
    counts. Raises UserError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise _missing(name, "sacrebleu") from None
    metric = {"bleu": BLEU, "chrf": CHRF}[name]()

    def row(answer: str, reference: str) -> Parts:
        return metric._extract_corpus_statistics([answer], [[reference]])[0]

    def score(sums_DS: np.ndarray) -> np.ndarray:
        scores = [metric._compute_score_from_stats(sums).score for sums in sums_DS.tolist()]
        return np.array(scores) / 100

    return row, score


def user_metric(name: str) -> Row:
    """The function that `package.module:function` names; it takes an answer and a reference, and
    returns a number, more for a better answer.

    Raises UserError where it cannot be imported or called with two texts. The row raises
    NoNumberError where the function raises, or returns no finite number.
    """
    function = _imported(name)

    def row(answer: str, reference: str) -> Parts:
        try:
            number = function(answer, reference)
        except Exception as error:
            raise NoNumberError(f"raised {type(error).__name__} ({error})") from error
        if not isinstance(number, Real | np.bool_) or not math.isfinite(number):
            raise NoNumberError(f"returned {number!r}, which is no finite number,")
        return float(number), 1.0

    return row


def _imported(name: str) -> Callable[[str, str], Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"evaluation.metrics: {name}: {module_name} cannot be imported "
            f"({type(error).__name__}: {error}); install it, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        raise UserError(f"evaluation.metrics: {name}: {module_name} has no {attribute}; correct it")
    if not callable(function):
        raise UserError(
            f"evaluation.metrics: {name} is {type(function).__name__}, no function; name one that "
            "takes an answer and a reference"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions in C tell nothing
        return function
    try:
        signature.bind("", "")
    except TypeError:
        raise UserError(
            f"evaluation.metrics: {name} takes {signature}; it is called with two texts, an answer "
            "and a reference"
        ) from None
    return function


def _missing(name: str, library: str) -> UserError:
    return UserError(
        f"evaluation.metrics: {name} needs {library}; install it with "
        "`pip install llamaweft[metrics]`"
    )
