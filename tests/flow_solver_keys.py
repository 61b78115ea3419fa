"""Other values of the keys of solvers whose noise levels are a flow's, for tests."""

from typing import Any

from tests.changed_keys import ABSENT

FLOW_SOLVER: dict[str, list[Any]] = {
    "flow_shift": [1.0, 6.0, 0.0, None, ABSENT],
    "use_flow_sigmas": [False, ABSENT],
    "prediction_type": ["epsilon", "v_prediction", ABSENT],
    "num_train_timesteps": [500],
    "solver_order": [1, 3],
    "solver_type": ["heun"],
    "lower_order_final": [False],
    "euler_at_final": [True],
    "final_sigmas_type": ["sigma_min"],
    "timestep_spacing": ["trailing", "leading"],
    "beta_end": [0.5],
    "use_karras_sigmas": [True],
    "use_lu_lambdas": [True],
    "thresholding": [True],
    "variance_type": ["learned", "fixed_small"],
    "use_dynamic_shifting": [True],
    "algorithm_type": ["sde-dpmsolver++"],
}
UNIPC = {key: values for key, values in FLOW_SOLVER.items() if key not in ("use_lu_lambdas", "variance_type")} | {
    "algorithm_type": [ABSENT],
    "euler_at_final": [ABSENT],
    "solver_type": ["midpoint"],
    "predict_x0": [False],
    "shift_terminal": [0.1],
    "disable_corrector": [[0]],
}
