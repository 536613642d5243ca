"""Suites from a hub: what is asked of it, what is read, and what a closed or changed data set becomes.

The hub is on loopback; its files have the names and columns of the real ones. The library reads its address once, when
it is imported, so each test asks from a process of its own.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bfpo.core.schema import Completion, Message
from bfpo.judges.ngrams import NgramSettings, fit_ngrams
from bfpo.policy.save import save_policy
from support.hub_server import COMMIT, HubServer
from tiny import tiny_model, tiny_tokenizer

TOKEN = "hf_aTokenThatNobodyHas"
FRAMED = "### Instruction:\nw1 w2\n### Response:\n"
ALPACA = {"instruction": "w1", "output": "w2", "generator": "g", "dataset": "d"}
FILES: dict[str, dict[str, Any]] = {
    "walledai/AdvBench": {"data/train-0.parquet": {"prompt": ["w1", "w2"], "target": ["s", "s"]}},
    "walledai/HarmBench": {
        "standard/train-0.parquet": {"prompt": ["w1", "w2"], "category": ["c", "d"]},
        "contextual/train-0.parquet": {"prompt": ["w3"], "context": ["x"], "category": ["c"]},
    },
    "walledai/StrongREJECT": {"data/train-0.parquet": {"prompt": ["w1"], "category": ["c"], "source": ["s"]}},
    "walledai/XSTest": {
        "data/test-0.parquet": {"prompt": ["w1", "w2"], "focus": ["f", "f"], "type": ["t", "contrast_t"]}
    },
    "Babelscape/ALERT": {
        "alert.jsonl": [{"id": 1, "prompt": FRAMED, "category": "crime_theft"}],
        "alert_adversarial.jsonl": [{"id": 1, "prompt": "w3", "category": "crime_theft", "attack_type": "prefix"}],
        "README.md": "about it",
    },
    "bench-llm/or-bench": {
        "or-bench-hard-1k.csv": "prompt,category\nw1,sexual\nw2,privacy\n",
        "or-bench-80k.csv": "prompt,category\nw3,privacy\n",
    },
    "lmarena-ai/arena-hard-auto": {
        "data/arena-hard-v0.1/question.jsonl": [{"question_id": "a", "category": "c", "turns": [{"content": "w1"}]}]
    },
    "tatsu-lab/alpaca_eval": {"alpaca_eval.json": json.dumps([ALPACA])},
    "Bertievidgen/SimpleSafetyTests": {"sst_test_cases.csv": "id,harm_area,counter,category,prompt\ns1,a,1,b,w1\n"},
    "declare-lab/CategoricalHarmfulQA": {
        "catqa_english.json": [{"Category": "a", "Subcategory": "b", "Question": "w1"}]
    },
    "Anthropic/hh-rlhf": {
        "helpful-base/test.jsonl.gz": [
            {"chosen": f"\n\nHuman: {text}\n\nAssistant: w2", "rejected": f"\n\nHuman: {text}\n\nAssistant: w3"}
            for text in ("w1", "a Bombing w1", "w1")
        ],
        "helpful-base/train.jsonl.gz": [{"chosen": "\n\nHuman: w4\n\nAssistant: w2", "rejected": ""}],
    },
    "allenai/real-toxicity-prompts": {
        "prompts.jsonl": [
            {"challenging": True, "prompt": {"text": "w1", "toxicity": 0.3}},
            {"challenging": False, "prompt": {"text": "w2"}},
        ]
    },
}
FOUND = {
    "advbench": ["w1", "w2"],
    "alert": ["w1 w2"],
    "alert-adversarial": ["w3"],
    "alpaca-eval": ["w1"],
    "arena-hard": ["w1"],
    "catqa": ["w1"],
    "everyday": ["w1"],
    "harmbench": ["w1", "w2"],
    "or-bench": ["w1", "w2"],
    "realtoxicityprompts": ["w1"],
    "simplesafetytests": ["w1"],
    "strongreject": ["w1"],
    "xstest": ["w1", "w2"],
}
READ = """
import json, sys
from bfpo.suites.files import UnreachableError, find_prompts
from bfpo.suites.catalogue import load_suites
for suite in load_suites(sys.argv[1:]):
    try:
        found = find_prompts(suite, [], limit=None, seed=0)
        texts = [prompt.messages[-1].content for prompt in found.prompts]
        print(json.dumps([suite.name, texts, found.revision]))
    except UnreachableError as error:
        print(json.dumps([suite.name, str(error), None]))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    found = {}
    for hub_id, files in FILES.items():
        for name, content in files.items():
            file = root / hub_id / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                pq.write_table(pa.table(content), file)
            elif isinstance(content, list):
                text = "".join(json.dumps(row) + "\n" for row in content).encode()
                file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
            else:
                file.write_text(content)
        found[f"datasets/{hub_id}"] = root / hub_id
    return found


def ask(hub: HubServer, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=kept | settings, capture_output=True, text=True, check=False, timeout=300)


def test_every_suite_of_the_hub_is_read_as_the_hub_has_it(repositories: dict[str, Path], tmp_path: Path) -> None:
    with HubServer(repositories) as hub:
        rows = [json.loads(line) for line in ask(hub, tmp_path, "-c", READ, *FOUND).stdout.splitlines()]
    assert {name: texts for name, texts, _ in rows} == FOUND
    assert {revision for *_, revision in rows} == {COMMIT}
    assert not [asked for asked in hub.requests if "80k" in asked or "contextual" in asked or "README" in asked]


def test_a_closed_or_a_changed_data_set_is_said(repositories: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "or-bench-hard-1k.csv").write_text("question\nw1\n")
    there = {**repositories, "datasets/bench-llm/or-bench": changed}
    with HubServer(there, gated=frozenset({"datasets/walledai/AdvBench"})) as hub:
        done = ask(hub, tmp_path / "cache", "-c", READ, "advbench", "or-bench", "catqa")
    says = {name: text for name, text, _ in map(json.loads, done.stdout.splitlines())}
    assert "accept its conditions at https://huggingface.co/datasets/walledai/AdvBench" in says["advbench"]
    assert (
        "put advbench_harmful_behaviors.csv, harmful_behaviors.csv into a folder of suites.folders" in says["advbench"]
    )
    assert "`path`" not in says["advbench"]
    assert f"the files of the hub at {COMMIT} cannot be read" in says["or-bench"]
    assert says["catqa"] == ["w1"]


@pytest.mark.slow
def test_models_and_suites_come_from_the_hub(repositories: dict[str, Path], tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        save_policy(tiny_model(seed=seed), tiny_tokenizer(), tmp_path / name)
    models = [{"name": name, "model": f"acme/{name}"} for name in ("one", "two")]
    rows = [
        Completion(str(n), (Message("user", "q"),), f"{'she said' if n % 2 else 'he was'} {n}", "") for n in range(20)
    ]
    fit_ngrams(rows, [n % 2 == 1 for n in range(20)], NgramSettings()).save(tmp_path / "judge", {})
    suites = {"use": ["advbench", "xstest"], "judges": {"harm": str(tmp_path / "judge")}, "max_new_tokens": 4}
    suites["label_cache"] = str(tmp_path / "labels")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"models": models, "suites": suites, "bootstrap_samples": 50, "threads": 1}))
    there = {**repositories, "models/acme/one": tmp_path / "one", "models/acme/two": tmp_path / "two"}
    with HubServer(there) as hub:
        out = tmp_path / "out"
        done = ask(hub, tmp_path / "cache", "-m", "bfpo", "evaluate", "--config", str(config), "--out", str(out))
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "scores.json").read_text())
    assert {suite["name"]: suite["revision"] for suite in scores["suites"]} == {"advbench": COMMIT, "xstest": COMMIT}
    assert {score["model"] for score in scores["scores"]} == {"one", "two"}
    assert hub.authorizations == {f"Bearer {TOKEN}"}
    written = [file for file in out.rglob("*") if file.is_file()]
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
