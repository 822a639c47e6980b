"""
ROUGE and chrF that read English and Korean, stopping, repetition and length of answers. Imports without torch.

    from finetuning.inference.metrics import compute_rouge
    compute_rouge(["#Person1#은 민수를 만났다."], [["#Person1#은 민수를 만났다."]])["rouge1"]   # 1.0

What is undefined (a reference without words, the repetition of three words) is None and counts in no mean.
"""

import collections
import itertools
from collections.abc import Iterable

from sacrebleu.metrics import CHRF

from finetuning.inference.references import mean, over_references
from finetuning.inference.words import choose_tokenizer, tokenize
from finetuning.measures import ROUGE_COLUMNS

SIMILARITIES = (*ROUGE_COLUMNS, "chrf")
PER_SAMPLE = (*SIMILARITIES, "seq_rep_4", "length_ratio")
MAX_DISCARDED = 0.05  # share of the characters that are in no token; above it, scores say little about the texts
CHUNK = 500  # samples scored at once


def compute_rouge(predictions: list[str], references: list[list[str]], tokenizer: str = "auto") -> dict:
    """ROUGE F1 between 0 and 1, plain means over samples.

    Args:
        predictions: One text a sample.
        references: The texts of each sample; one without any has no score.
        tokenizer: One of TOKENIZERS, or `auto`, which looks at the script of each sample's references.

    Returns:
        For each of rouge1, rouge2, rougeL: `<type>` (mean over references), `<type>_first` and `<type>_max`, each with
        a list of them, `<...>_per_sample`. None against references without a token; an empty prediction scores 0.
        `tokenizers` counts samples by the tokenizer they were read with; `tokenizer_per_sample` has its name in
        TOKENIZERS. `discarded_characters` is the mean share of characters, spaces and punctuation aside, that are in
        no token; `discarded_characters_per_sample` has each sample's.
    """
    from finetuning.inference.rouge import Rouge  # late, as it imports torch

    return Rouge().compute(predictions=predictions, references=references, tokenizer=tokenizer)


def compute_chrf(predictions: list[str], references: list[list[str]]) -> dict:
    """chrF2 between 0 and 1 by sacrebleu (Popović 2015, https://aclanthology.org/W15-3049), in the form of ROUGE.

    F-score of character 6-grams and shorter ones, without a tokenizer; particles and endings count by their characters.
    """
    chrf = CHRF()
    scores = [
        [chrf.sentence_score(prediction, [r]).score / 100 if r.strip() else None for r in sample_references]
        for prediction, sample_references in zip(predictions, references, strict=True)
    ]
    return over_references("chrf", scores)


def count_ngrams(text: str, n: int, tokenizer: str = "auto") -> collections.Counter:
    """n-grams of the tokens that ROUGE sees."""
    tokens, _ = tokenize(text, choose_tokenizer(text, [], tokenizer))
    return collections.Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def sequence_repetition(text: str, n: int = 4, tokenizer: str = "auto") -> float | None:
    """seq-rep-n: share of n-grams that stood in the text before (Welleck et al. 2020, arXiv:1908.04319).

    Over the words or morphemes that ROUGE sees. None for a text with fewer than n of them.

    >>> sequence_repetition("a b c d a b c d a b c d")
    0.5555555555555556
    """
    ngrams = count_ngrams(text, n, tokenizer)
    return 1 - len(ngrams) / ngrams.total() if ngrams else None


def length_ratio(prediction: str, references: list[str], tokenizer: str) -> float | None:
    """Tokens of the answer for each token of its references on average. None without these.

    As BLEU's length ratio (Papineni et al. 2002, https://aclanthology.org/P02-1040), by sample.
    """
    expected = mean(len(tokenize(reference, tokenizer)[0]) for reference in references)
    return len(tokenize(prediction, tokenizer)[0]) / expected if expected else None


def score_predictions(rows: Iterable[dict], tokenizer: str = "auto") -> dict:
    """What step 3 reports of one model. Rows are taken a few at a time and not kept.

    Args:
        rows: Predictions as finetuning/schemas.py describes them. Rows with an error have no prediction; they are
            counted and nothing else.
        tokenizer: As for `compute_rouge`.

    Returns:
        num_samples, num_errors, and over the answered samples

            rouge1, rouge2, rougeL, chrf    with their `_first` and `_max`
            stop_rate                       share that ended by itself, with an end token or a stop string
            limit_rate                      share that was cut off at max_new_tokens
            empty_rate                      share without any text
            seq_rep_4                       mean of `sequence_repetition`
            distinct_2                      different bigrams of all answers together, for each bigram of them (Li et
                                            al. 2016, https://aclanthology.org/N16-1014); near 0 where answers are all
                                            the same. It falls with the number of samples: compare over the same ones
            length_ratio                    mean of `length_ratio`
            mean_new_tokens                 tokens of the model, end token included
            rouge_tokenizer, tokenizers, discarded_characters    what was asked for; as `compute_rouge`
            removed_tokens                  control tokens that were taken out of the answers, counted by name

        Each is None where nothing defines it. `per_sample` has a list for `id` and each of PER_SAMPLE, as rows come.
    """
    totals = _Totals()
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        totals.num_rows += len(chunk)
        answered = [row for row in chunk if row["finish_reason"] != "error"]
        if answered:
            totals.add(answered, tokenizer)
    return totals.summarize(tokenizer)


class _Totals:
    """What is kept of the rows that have been read: a few numbers of each, and counts over all of them."""

    def __init__(self) -> None:
        self.num_rows = 0  # those with an error as well
        self.counts: collections.Counter[str] = collections.Counter()
        self.removed: collections.Counter[str] = collections.Counter()
        self.tokenizers: collections.Counter[str] = collections.Counter()
        self.bigrams: set[int] = set()  # hashes
        variants = [f"{name}{variant}" for variant in ("", "_first", "_max") for name in SIMILARITIES]
        names = ("id", *variants, "seq_rep_4", "length_ratio", "discarded_characters")
        self.columns: dict[str, list] = {name: [] for name in names}

    def add(self, rows: list[dict], tokenizer: str) -> None:
        """Take in rows that have an answer."""
        predictions, references = ([row[key] for row in rows] for key in ("prediction", "references"))
        scores = compute_rouge(predictions, references, tokenizer=tokenizer) | compute_chrf(predictions, references)
        for name, values in self.columns.items():
            values += scores.get(f"{name}_per_sample", [])
        self.tokenizers.update(scores["tokenizers"])
        for row, own in zip(rows, scores["tokenizer_per_sample"], strict=True):
            prediction = row["prediction"]
            self.columns["id"].append(row["id"])
            self.columns["seq_rep_4"].append(sequence_repetition(prediction, 4, own))
            self.columns["length_ratio"].append(length_ratio(prediction, row["references"], own))
            bigrams = count_ngrams(prediction, 2, own)
            self.bigrams.update(map(hash, bigrams))
            self.counts.update([row["finish_reason"]], bigrams=bigrams.total(), new_tokens=row["num_new_tokens"])
            self.counts["empty"] += not prediction.strip()
            self.removed.update(row.get("removed_tokens"))

    def summarize(self, tokenizer: str) -> dict:
        """The result of `score_predictions`."""
        num_answered = len(self.columns["id"])
        means = {name: mean(values) for name, values in self.columns.items() if name != "id"}

        def per_answer(name: str) -> float | None:
            return self.counts[name] / num_answered if num_answered else None

        return {
            "num_samples": self.num_rows,
            "num_errors": self.num_rows - num_answered,
            **means,
            "stop_rate": per_answer("stop"),
            "limit_rate": per_answer("length"),
            "empty_rate": per_answer("empty"),
            "distinct_2": len(self.bigrams) / self.counts["bigrams"] if self.counts["bigrams"] else None,
            "mean_new_tokens": per_answer("new_tokens"),
            "rouge_tokenizer": tokenizer,
            "tokenizers": dict(self.tokenizers),
            "removed_tokens": dict(self.removed),
            "per_sample": {name: self.columns[name] for name in ("id", *PER_SAMPLE)},
        }
