"""Wrong input by the dozen (T15): tables only, read by test_cli.py."""

# ruff: noqa: E501 - one case a line
# fmt: off

RECIPE = """\
name: tiny
output: runs
model:
  name: model
control:
  num_expanded: 2
pack:
  context_length: 64
mix:
  datasets:
    - name: puzzles
      rows: 50
train:
  steps: 4
  lr: 1e-4
benchmark:
  new: [puzzles]
  old: [prose]
"""

# name: (written in RECIPE, or "" for its train section's end; written instead; the line that is named; what is said ... in this order)
WRONG_RECIPES: dict[str, tuple[str, str, int, str]] = {
    "unknown key, top": ("benchmark:", "benchmrk:", 16, "unknown key 'benchmrk' ... did you mean 'benchmark'?"),
    "unknown key, nested": ("  steps: 4", "  stepz: 4", 14, "unknown key 'train.stepz' ... did you mean 'steps'?"),
    "unknown key, case": ("  lr: 1e-4", "  LR: 1e-4", 15, "unknown key 'train.LR' ... did you mean 'lr'?"),
    "unknown key, section's case": ("train:", "Train:", 13, "unknown key 'Train' ... did you mean 'train'?"),
    "unknown key, of another section": ("name: tiny", "name: tiny\nlr: 1", 2, "'lr' ... did you mean 'train.lr'?"),
    "unknown key, in a list": ("      rows: 50", "      row: 50", 12, "'mix.datasets.0.row' ... 'rows'?"),
    "unknown key, of one kind": ("", "  parallel: {kind: fsdp, replica: 2}", 16, "'train.parallel.replica' ... 'replicas'?"),
    "unknown key, like nothing": ("name: tiny", "name: tiny\nzzz: 1", 2, "unknown key 'zzz' ... known here: name,"),
    "unknown key, unprintable": ("name: tiny", "name: tiny\n\"a\\n\\eb\": 1", 2, "unknown key"),
    "number as key": ("name: tiny", "name: tiny\n5: 1", 2, "keys are words, found '5'"),
    "word for number": ("  steps: 4", "  steps: many", 14, "train.steps: must be a whole number, found 'many'"),
    "list for number": ("  steps: 4", "  steps: [4]", 14, "train.steps: must be a whole number, found [4]"),
    "section for number": ("  steps: 4", "  steps: {a: 4}", 14, "train.steps ... whole number, found a section"),
    "flag for number": ("  steps: 4", "  steps: true", 14, "train.steps: must be a whole number, found true"),
    "flag for float": ("  lr: 1e-4", "  lr: true", 15, "train.lr: must be a number, found true"),
    "flag for one of several numbers": ("", "  trainer: transformers\n  parallel: {kind: deepspeed, zero_stage: true}", 17, "train.parallel.zero_stage: must be 1, 2 or 3, found 'true'"),
    "fraction for whole number": ("  steps: 4", "  steps: 4.5", 14, "train.steps ... whole number, found 4.5"),
    "number for text": ("name: tiny", "name: 5", 1, "name: must be text, found 5; put it in quotes"),
    "number for flag": ("", "  checkpoint: {asynchronous: 1}", 16, "train.checkpoint.asynchronous: must be true or false, found 1"),
    "word for list": ("  new: [puzzles]", "  new: puzzles", 17, "benchmark.new: must be a list, found 'puzzles'"),
    "number for section": ("control:\n  num_expanded: 2", "control: 2", 5, "control: must be a section ... found 2"),
    "false for section": ("name: tiny", "name: tiny\nsmoke: false", 2, "smoke ... null turns an optional section off"),
    "nothing for section": ("model:\n  name: model", "model:", 3, "model: must be a section ... found null"),
    "numeric string": ("  steps: 4", "  steps: \"4\"", 14, "train.steps ... found '4'; remove the quotes"),
    "leading zero": ("  steps: 4", "  steps: 010", 14, "train.steps ... found '010'; remove the leading zero"),
    "not a number": ("  lr: 1e-4", "  lr: .nan", 15, "train.lr: must be a finite number, found .nan"),
    "infinity": ("  lr: 1e-4", "  lr: .inf", 15, "train.lr: must be a finite number, found .inf"),
    "minus infinity": ("  lr: 1e-4", "  lr: -.inf", 15, "train.lr: must be a finite number, found -.inf"),
    "beyond float": ("  lr: 1e-4", "  lr: 1e999", 15, "train.lr: must be a finite number, found .inf"),
    "negative": ("  steps: 4", "  steps: -4", 14, "train.steps: must be greater than 0, found -4"),
    "negative float": ("  lr: 1e-4", "  lr: -1e-4", 15, "train.lr: must be greater than 0, found -0.0001"),
    "zero": ("  num_expanded: 2", "  num_expanded: 0", 6, "control.num_expanded: must be greater than 0, found 0"),
    "huge": ("  steps: 4", f"  steps: {10**30}", 14, "train.steps: must be at most 1000000000000, found 1000"),
    "huge beyond integers": ("  steps: 4", f"  steps: {'9' * 9000}", 14, "train.steps: must be a whole number"),
    "large fraction": ("  lr: 1e-4", "  lr: 2", 15, "train.lr: must be at most 1, found 2"),
    "bad choice": ("  num_expanded: 2", "  divergence: msee", 6, "control.divergence: must be 'mse', 'cosine' ... did you mean 'mse'?"),
    "bad choice, case": ("", "  trainer: Native", 16, "train.trainer: must be 'native' or ... did you mean 'native'?"),
    "bad choice or list": ("  num_expanded: 2", "  sites: midle", 6, "control.sites: must be 'evenly', 'top' or 'every_nth_of_top' or a list, found 'midle'"),
    "bad item of choice or list": ("  num_expanded: 2", "  sites: [1, a]", 6, "control.sites.1: must be a whole number, found 'a'"),
    "bad kind": ("", "  parallel: {kind: fsdpp}", 16, "train.parallel.kind: must be 'ddp', 'fsdp' or 'deepspeed'"),
    "kind missing": ("", "  parallel: {replicas: 2}", 16, "required key 'train.parallel.kind' is missing"),
    "bad tracker": ("", "  metrics: {trackers: [wand]}", 16, "train.metrics.trackers.0 ... did you mean 'wandb'?"),
    "bad run name": ("name: tiny", "name: ../tiny", 1, "name: must be letters, digits ... found '../tiny'"),
    "empty text": ("  name: model", "  name: ''", 4, "model.name: must be text that is not empty, found ''"),
    "missing, top": ("name: tiny\n", "", 1, "required key 'name' is missing"),
    "missing, nested": ("  name: model", "  revision: main", 3, "required key 'model.name' is missing"),
    "control and lora": ("name: tiny", "name: tiny\nlora: {}", 6, "control and lora exclude each other"),
    "quantization of nothing": ("control:\n  num_expanded: 2", "quantization: {}", 5, "quantization stores frozen weights: it needs a control, lora, ia3 or prompt section"),
    "native and DeepSpeed": ("", "  parallel: {kind: deepspeed}", 16, "train.parallel.kind deepspeed needs trainer: transformers"),
    "batch not a multiple": ("", "  micro_batch_size: 3", 13, "train.global_batch_size 8 is not a multiple of micro_batch_size 3"),
    "warm-up too long": ("", "  schedule: {warmup_steps: 4}", 16, "train.schedule.warmup_steps 4 leaves none of 4"),
    "sites repeated": ("  num_expanded: 2", "  num_expanded: 2\n  sites: [1, 1]", 7, "control.sites [1, 1] must be"),
    "sites miscounted": ("  num_expanded: 2", "  num_expanded: 3\n  sites: [1, 2]", 6, "num_expanded is 3 ... 2 layers"),
    "no dataset": ("  datasets:\n    - name: puzzles\n      rows: 50", "  datasets: []", 10, "mix.datasets ... a list that is not empty"),
    "dataset twice": ("      rows: 50", "    - name: puzzles", 10, "mix.datasets names puzzles more than once"),
    "source without format": ("      rows: 50", "      source: a.jsonl", 12, "mix.datasets.0.source: a.jsonl: no such file"),
    "probe on both sides": ("  old: [prose]", "  old: [puzzles]", 18, "benchmark.old names puzzles, which is in new"),
    "duplicate key": ("  lr: 1e-4", "  lr: 1e-4\n  steps: 5", 16, "'train.steps' is given twice (first on line 14)"),
    "YAML tag": ("  steps: 4", "  steps: !!python/object/apply:os.system [id]", 14, "tag !!python/object/apply:os.system is not"),
    "harmless YAML tag": ("  steps: 4", "  steps: !!int 4", 14, "the tag !!int is not allowed"),
    "YAML alias": ("  steps: 4\n  lr: 1e-4", "  steps: &a 4\n  lr: *a", 15, "aliases (*name) are not allowed"),
    "merge key": ("train:", "train:\n  <<: {lr: 1}", 14, "unknown key 'train.<<'"),
    "tab indent": ("  steps: 4", "\tsteps: 4", 14, "the line is indented with a tab; use spaces"),
    "open bracket": ("  old: [prose]", "  old: [prose", 19, "not valid YAML ... the end of the text"),
    "NUL": ("  steps: 4", "  steps: \u0000", 14, "not valid YAML ... special characters are not allowed"),
    "two documents": ("train:", "---\ntrain:", 13, "not valid YAML ... found another document"),
    # known only with the model, the catalog and the disk at hand
    "E not dividing L": ("  num_expanded: 2", "  num_expanded: 3", 6, "control.num_expanded: 3 ... 4 layers ... 1, 2, 4"),
    "E above L": ("  num_expanded: 2", "  num_expanded: 8", 6, "control.num_expanded: 8 ... 4 layers"),
    "site out of range": ("  num_expanded: 2", "  num_expanded: 1\n  sites: [4]", 7, "control.sites: layer 4 ... 0..3"),
    "context above the model's": ("  context_length: 64", "  context_length: 129", 8, "pack.context_length: 129 ... 128 positions; use at most that"),
    "no such model": ("  name: model", "  name: ./modle", 4, "model.name: ./modle: no such model folder ... mean model?"),
    "unknown dataset": ("    - name: puzzles", "    - name: puzzels", 11, "mix.datasets.0.name: unknown dataset 'puzzels' ... 'puzzles'?"),
    "unknown probe": ("  old: [prose]", "  old: [mmlu, pros]", 18, "benchmark.old.1: unknown task 'pros' ... 'prose'?"),
    "no such data": ("      rows: 50", "      source: no.jsonl\n      format: text", 12, "mix.datasets.0.source: no.jsonl: no such file"),
    "output is a file": ("output: runs", "output: recipe.yaml", 2, "output: 'recipe.yaml' ... is not a folder"),
    "output in the cache": ("output: runs", "output: cache/runs", 2, "output: 'cache/runs' lies inside the cache"),
    "cache in the output": ("name: tiny\noutput: runs", "name: home\noutput: ..", 2, "output: the cache ... lies inside"),
}

WRONG_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the recipe is empty"),
    "only a comment": (b"# nothing\n", "the recipe is empty"),
    "a list": (b"- name: tiny\n", "a recipe is a mapping of sections (name:, model:, train:, ...), found a list"),
    "prose": (b"This is not YAML at all\n", "a recipe is a mapping of sections"),
    "not UTF-8": (b"name: \xff\xfe\n", "not UTF-8 text (byte 6)"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not UTF-8 text"),
    "brackets without end": (b"[" * 9000, "nested too deeply"),
    "very long": (b"a" * 2_000_000, "this is no recipe"),
}

WRONG_OVERRIDES = {
    "train.steps": "expected section.key=value, for example train.lr=1e-4",
    "=5": "expected section.key=value",
    "train..steps=5": "expected section.key=value",
    "0.steps=5": "expected section.key=value",
    "train/steps=5": "expected section.key=value",
    "train.steps={": "not valid YAML: expected the node content",
    "train.steps=!!python/name:os.system": "the tag !!python/name:os.system is not allowed",
    "train={lr: 1, lr: 2}": "key 'lr' is given twice",
    "train.stepz=5": "unknown key 'train.stepz'; did you mean 'steps'?",
    "trian.steps=5": "unknown key 'trian'; did you mean 'train'?",
    "train.steps=": "train.steps and tokens are both null: say how long the run is with one of them",
    "train.steps=five": "train.steps: must be a whole number, found 'five'",
    "train.steps.x=5": "nothing can stand below the single value 4",
    "mix.datasets.1.rows=5": "1 is no position in a list of 1",
    "mix.datasets.first.rows=5": "'first' is no position in a list of 1",
    "control.num_expanded=3": "control.num_expanded: 3 does not divide the model's 4 layers",
}
