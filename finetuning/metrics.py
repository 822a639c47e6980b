"""
ROUGE that reads English and Korean, the share of answers that stopped, and repetition. Imports without torch.

    from finetuning.metrics import compute_rouge
    compute_rouge(["#Person1#은 민수를 만났다."], [["#Person1#은 민수를 만났다."]])["rouge1"]   # 1.0
"""

import functools
import re
import statistics
import unicodedata

import datasets
import evaluate
from mecab import MeCab
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
TAG = re.compile(r"#\w+#")  # a speaker tag of DialogSum is one word
# Scripts written without spaces count by character: kana, CJK ideographs, Thai, Lao, Khmer.
CHARACTER_SCRIPTS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1780-\u17ff"
WORD = re.compile(rf"[{CHARACTER_SCRIPTS}]|[^\W_{CHARACTER_SCRIPTS}]+")
HANGUL = re.compile(r"[\uac00-\ud7a3]")


def detect_language(text: str) -> str:
    """`ko` where at least a fifth of the letters are Hangul syllables, else `en`, which is any other language too."""
    letters = sum(c.isalpha() for c in TAG.sub("", text))
    return "ko" if letters and len(HANGUL.findall(text)) >= letters / 5 else "en"


@functools.cache
def _mecab() -> MeCab:
    return MeCab()


@functools.cache
def _stem(word: str) -> str:
    return PorterStemmer().stem(word)


def _split_words(text: str) -> list[str]:
    """Words in lower case; ASCII words of more than three letters stemmed as rouge_score does, others as they are."""
    words = WORD.findall(text.lower())
    return [_stem(word) if len(word) > 3 and word.isascii() else word for word in words]


class RougeTokenizer:
    """Tokenizer for rouge_score: `#Person1#` is one token; Korean becomes morphemes, all else words.

    rouge_score's own tokenizer keeps [a-z0-9] only, so that two equal Korean sentences score 0 and two unlike ones
    with the same speaker tags score 1.
    """

    def __init__(self, language: str):
        self.language = language

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text)
        tokens, position = [], 0
        for tag in TAG.finditer(text):
            tokens += [*self._tokenize_plain(text[position : tag.start()]), tag[0].lower()]
            position = tag.end()
        return tokens + self._tokenize_plain(text[position:])

    def _tokenize_plain(self, text: str) -> list[str]:
        if self.language == "ko" and text.strip():
            text = " ".join(_mecab().morphs(text))
        return _split_words(text)


class Rouge(evaluate.Metric):
    """ROUGE-1, -2 and -L F1 as a metric of `evaluate` that needs no network.

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

    def _compute(self, predictions, references, language="auto"):
        per_sample = [_score(p, refs, language) for p, refs in zip(predictions, references, strict=True)]
        result = {}
        for rouge_type in ROUGE_TYPES:
            scores = [sample[rouge_type] for sample in per_sample]
            result[rouge_type] = statistics.fmean(statistics.fmean(s) for s in scores)
            result[f"{rouge_type}_first"] = statistics.fmean(s[0] for s in scores)
            result[f"{rouge_type}_max"] = statistics.fmean(max(s) for s in scores)
            result[f"{rouge_type}_per_sample"] = [statistics.fmean(s) for s in scores]
        return result


def _score(prediction: str, references: list[str], language: str) -> dict[str, list[float]]:
    """F1 against each reference."""
    if language == "auto":
        language = detect_language(" ".join(references))
    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), tokenizer=RougeTokenizer(language))
    scores = [scorer.score(reference, prediction) for reference in references]
    return {rouge_type: [score[rouge_type].fmeasure for score in scores] for rouge_type in ROUGE_TYPES}


def compute_rouge(predictions: list[str], references: list[list[str]], language: str = "auto") -> dict:
    """ROUGE F1 between 0 and 1, plain means over samples.

    Args:
        predictions: One text a sample.
        references: One or more texts a sample.
        language: `en`, `ko`, or `auto`, which looks at the script of each sample's references.

    Returns:
        For each of rouge1, rouge2, rougeL: `<type>` (mean over references), `<type>_first`, `<type>_max`, and
        `<type>_per_sample`, a list.
    """
    return Rouge().compute(predictions=predictions, references=references, language=language)


def sequence_repetition(text: str, n: int = 4) -> float:
    """seq-rep-n: share of n-grams that stood in the text before (Welleck et al. 2020, arXiv:1908.04319).

    Over the words or morphemes that ROUGE sees. 0 for a text with fewer than n of them.

    >>> sequence_repetition("a b c d a b c d a b c d")
    0.5555555555555556
    """
    tokens = RougeTokenizer(detect_language(text)).tokenize(text)
    ngrams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def score_predictions(rows: list[dict]) -> dict:
    """What step 3 reports of one model.

    Args:
        rows: Predictions as finetuning/results.py describes them. Rows with an error have no prediction; they are
            counted and nothing else.

    Returns:
        num_samples, num_errors, and over the answered samples rouge1, rouge2, rougeL with their `_first` and `_max`,
        stop_rate, seq_rep_4, mean_new_tokens; None where no sample was answered. `per_sample` maps ids to their
        rouge1, rouge2, rougeL and seq_rep_4.
    """
    answered = [row for row in rows if row["finish_reason"] != "error"]
    counts = {"num_samples": len(rows), "num_errors": len(rows) - len(answered)}
    names = [f"{t}{suffix}" for t in ROUGE_TYPES for suffix in ("", "_first", "_max")]
    if not answered:
        return {**counts, **dict.fromkeys([*names, "stop_rate", "seq_rep_4", "mean_new_tokens"]), "per_sample": {}}
    rouge = compute_rouge([row["prediction"] for row in answered], [row["references"] for row in answered])
    repetition = [sequence_repetition(row["prediction"]) for row in answered]
    per_sample = {
        row["id"]: {**{t: rouge[f"{t}_per_sample"][i] for t in ROUGE_TYPES}, "seq_rep_4": repetition[i]}
        for i, row in enumerate(answered)
    }
    return {
        **counts,
        **{name: rouge[name] for name in names},
        "stop_rate": statistics.fmean(row["finish_reason"] == "stop" for row in answered),
        "seq_rep_4": statistics.fmean(repetition),
        "mean_new_tokens": statistics.fmean(row["num_new_tokens"] for row in answered),
        "per_sample": per_sample,
    }
