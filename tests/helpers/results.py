"""Results of runs, as recipes write them."""

PATHS = [f"bert.encoder.layer.{i}.{part}.LayerNorm" for part in ("attention.output", "output") for i in (0, 1)]


def make_result(norm, seed, accuracy, **entries):
    swapped = {"norm": norm, "options": {"num_groups": 4} if norm == "powernorm" else {}, "modules": PATHS}
    return {
        "task": "rte",
        "model": "google-bert/bert-base-uncased",
        "norm": norm,
        "norm_swap": {"format_version": 1, "norms": [swapped]},
        "seed": seed,
        "metrics": {"accuracy": accuracy},
        "baselines": {"majority class": 0.5271},
        "arguments": {
            "dataset_name": "nyu-mll/glue",
            "eval_examples": 277,
            "learning_rate": 3e-5,
            "norm": norm,
            "seed": seed,
            "model_name_or_path": "./bert",
        },
        "history": [{"step": 1, "loss": 0.7, "tid_mean_max": 0.0, "tid_var_max": 0.25 + seed}, {"step": 1}],
        "versions": {"python": "3.12.9", "torch": "2.9.1"},
        "hardware": "one kind of CPU",
        "command": f"python recipes/glue.py rte.yaml --seed {seed}",
    } | entries


RESULTS = [make_result("powernorm", 0, 0.61), make_result("powernorm", 1, 0.65), make_result("layernorm", 0, 0.67)]
