"""What older versions of transformers, which the package supports, do not do."""

import transformers
from packaging import version


BEFORE_5_23 = version.parse(transformers.__version__) < version.parse("5.23")
NO_EXPORTER = "the exporter to ONNX needs transformers 5.23"
NO_SCALED_LOSS = "transformers before 5.23 has no loss_is_scaled_for_ga"
NO_LAYERDROP_IN_A_GRAPH = "before 5.23 the layerdrop of a Marian in training mode cannot be compiled"
NO_RESUME_ON_CPU_RANKS = "before 5.23 a resumed run of CPU ranks loads its state onto cpu:0, which torch cannot"
