"""What runs of a recipe on several processes share."""

import pytest

from tests.helpers.recipes import model_folder, write_task  # noqa: F401


@pytest.fixture
def command(tmp_path, model_folder):  # noqa: F811
    """A function that returns the command of a run of the GLUE recipe, with these options."""
    data = write_task(tmp_path / "glue", "sst2", {"train": 64, "validation": 10})

    def command(output, *options):
        shared = [f"--dataset_name={data}", f"--model_name_or_path={model_folder}", "--task_name=sst2"]
        shared += ["--max_length=20", "--learning_rate=0.01", "--use_cpu=true", "--norm=rbn", "--report_to=none"]
        return ["-m", "recipes.glue", *shared, f"--output_dir={output}", *options]

    return command
