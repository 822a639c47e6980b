"""ROUGE as a metric of the package `evaluate`, which imports torch wherever it is installed."""

import collections

import datasets
import evaluate
from rouge_score import rouge_scorer

from finetuning.inference.references import mean, over_references
from finetuning.inference.words import TOKENIZERS, choose_tokenizer, discarded_share, tokenize
from finetuning.measures import ROUGE_COLUMNS


class RougeTokenizer:
    """Tokenizer for rouge_score that keeps `#Person1#` as one token, by its name in TOKENIZERS.

    rouge_score's own keeps [a-z0-9] only, so that two equal Korean sentences score 0 and two unlike ones with the same
    speaker tags score 1.
    """

    def __init__(self, name: str):
        self.name = name

    def tokenize(self, text: str) -> list[str]:
        return tokenize(text, self.name)[0]


class Rouge(evaluate.Metric):
    """ROUGE-1, -2 and -L F1 (Lin 2004, https://aclanthology.org/W04-1013) in `evaluate`, which needs no network for it.

    Takes predictions (str) and references (list of str each). Of several references the mean counts, as in DialogSum's
    paper (https://aclanthology.org/2021.findings-acl.449); the first and the best are given beside it.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references, tokenizer="auto"):
        names: list[str] = []
        discarded: list[float] = []
        scores: dict[str, list[list[float | None]]] = {rouge_type: [] for rouge_type in ROUGE_COLUMNS}
        for prediction, sample_references in zip(predictions, references, strict=True):
            name = choose_tokenizer(prediction, sample_references, tokenizer)
            names.append(name)
            discarded.append(discarded_share([prediction, *sample_references], name))
            scorer = rouge_scorer.RougeScorer(ROUGE_COLUMNS, tokenizer=RougeTokenizer(name))
            found = [scorer.score(r, prediction) if tokenize(r, name)[0] else None for r in sample_references]
            for rouge_type in ROUGE_COLUMNS:
                scores[rouge_type].append([one and one[rouge_type].fmeasure for one in found])
        result = {
            "tokenizers": dict(collections.Counter(TOKENIZERS[name] for name in names)),
            "tokenizer_per_sample": names,
            "discarded_characters": mean(discarded),
            "discarded_characters_per_sample": discarded,
        }
        for rouge_type in ROUGE_COLUMNS:
            result |= over_references(rouge_type, scores[rouge_type])
        return result
