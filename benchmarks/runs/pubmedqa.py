"""`python -m benchmarks.runs.pubmedqa FOLDER OUT`: PubMedQA's labelled questions as train.jsonl and test.jsonl.

FOLDER holds ori_pqal.json and test_ground_truth.json, as https://github.com/pubmedqa/pubmedqa has them; the official
test ids are the test set. Columns: question, context, conclusion (the long answer), decision (yes, no or maybe).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    questions = json.loads((options.folder / "ori_pqal.json").read_text(encoding="utf-8"))
    tests = json.loads((options.folder / "test_ground_truth.json").read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("train", False), ("test", True)):
        rows = [
            {
                "question": q["QUESTION"],
                "context": "\n".join(q["CONTEXTS"]),
                "conclusion": q["LONG_ANSWER"],
                "decision": q["final_decision"],
            }
            for identifier, q in questions.items()
            if (identifier in tests) is wanted
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(rows)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
