"""TF-IDF and logistic regression on the rows that a recipe of `task: sequence_classification`
learns from, after its cleaning: what a tuned model has to beat.

    python examples/spam_baseline.py RECIPE      (pip install scikit-learn)
"""

from __future__ import annotations

import sys

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

from llamaweft.pipeline import Pipeline
from llamaweft.recipe import Recipe


def main() -> None:
    data = Pipeline(Recipe.load(sys.argv[1])).data
    sides = [
        ([example.text for example in side], [example.target.labels[0] for example in side])
        for side in (data.examples, data.validation)
    ]
    (texts, labels), (held_texts, held_labels) = sides
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(max_iter=1000))
    model.fit(texts, labels)
    said = model.predict(held_texts)
    print(f"{len(texts)} rows learnt, {len(held_texts)} held out")
    print(f"accuracy {accuracy_score(held_labels, said):.4f}")
    print(f"macro_f1 {f1_score(held_labels, said, average='macro'):.4f}")


if __name__ == "__main__":
    main()
