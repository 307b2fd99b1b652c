"""Tasks of lm-evaluation-harness that need no hub: a YAML file beside its rows."""

from __future__ import annotations

import json
from pathlib import Path

CHOICES = ("a", "b", "c")


def write_tasks(folder: Path, count: int = 12) -> str:
    """Write a task of choices, `letters`, and one of perplexity, `passages`. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": f"word {i % 7}:", "gold": i % 3} for i in range(count)]
    data = folder / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\nmetadata:\n  version: 1.0\n"
    choices = ", ".join(json.dumps(letter) for letter in CHOICES)
    (folder / "letters.yaml").write_text(
        f'task: letters\n{files}output_type: multiple_choice\ndoc_to_text: "{{{{question}}}}"\n'
        f"doc_to_choice: [{choices}]\ndoc_to_target: gold\nfewshot_split: train\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "passages.yaml").write_text(
        f'task: passages\n{files}output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{question}} {{question}}"\n'
        "metric_list:\n  - metric: word_perplexity\n    aggregation: weighted_perplexity\n    higher_is_better: false\n"
    )
    return str(folder)
