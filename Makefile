# Each target creates the virtual environment that it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRL_VENV := .venv-parity
# tests/conftest.py sorts the tests: files that take minutes come first.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder
QUICK := not system and not thorough and not same_bits and not parity and not compiled and not eight_bit
# Both sides of a Ray cluster must agree on token authentication.
export RAY_AUTH_MODE ?= token
export HF_HUB_DISABLE_TELEMETRY ?= 1
# Each worker and each program that a test starts imports the code: compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-words test test-all-cases test-kernels rounding test-system test-thorough eight-bit oldest compiled same-bits parity check bench demo-seeds lag-study algorithm-study short-study edit-grey three-steps animal-reward guard held-out window saved-calls step-counts overlap broadcast whole-network rewards-bench soak chaos scale bench-trl bench-target bench-gpu bench-gpu-families size-check configuration pretrain pretrain-words site verification clean video-motion

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/ddpo train deploy/recipes/demo.toml
	$(BIN)/ddpo report runs/demo

demo-words: $(VENV)/installed
	rm -rf runs/demo_words
	$(BIN)/ddpo train deploy/recipes/demo_words.toml
	$(BIN)/ddpo report runs/demo_words

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m "$(QUICK)" tests

test-system: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m system tests

test-thorough: $(VENV)/installed
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m thorough tests

# All cases of the tests that take turns, of which DDPO_TEST_TURN chooses some elsewhere.
test-all-cases: export DDPO_TEST_TURN = all
test-all-cases: test test-system test-thorough

# Repeat tests with other CPU kernels: make test-kernels KERNELS=ONEDNN_MAX_CPU_ISA=AVX2. PART=tests repeats all of them.
PART ?= tests/common/diffusion tests/learner tests/actors tests/contracts
# Files, refusals and sizes depend on no kernel.
WITHOUT_KERNELS := learner/test_checkpoint learner/test_checkpoint_faults learner/test_shards learner/test_resume \
    contracts/test_trackers common/diffusion/test_policy_trial common/diffusion/test_model_folders_refused \
    common/diffusion/test_sizes common/diffusion/test_sizes_cache common/diffusion/test_repeated_operations
test-kernels: $(VENV)/installed
	env $(KERNELS) $(BIN)/python -m pytest $(TWO_AT_ONCE) -m "$(QUICK)" $(WITHOUT_KERNELS:%=--ignore=tests/%.py) $(PART)

# bitsandbytes is installed apart, because peft imports it in every process if it can, which takes 1.7 s.
eight-bit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --constraint constraints.txt --target .venv-8bit bitsandbytes
	PYTHONPATH=.venv-8bit $(BIN)/python -m pytest -m eight_bit tests/learner

# The oldest transformers that pyproject.toml allows, with its dependencies, installed apart.
oldest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv-oldest "transformers==5.6.0" "huggingface_hub==1.33.0" "tokenizers==0.22.2"
	PYTHONPATH=.venv-oldest $(BIN)/python -m pytest tests/common/diffusion/test_policy_families.py tests/common/diffusion/test_model_folders.py tests/common/diffusion/test_model_folders_refused.py tests/common/diffusion/test_single_file.py tests/common/test_tiny_animals.py tests/common/test_clip_towers.py tests/common/test_pretrained.py

compiled: $(VENV)/installed
	$(BIN)/python -m pytest -m compiled tests

same-bits: $(VENV)/installed
	DDPO_TEST_ROUNDS=12 $(BIN)/python -m pytest -m "system or same_bits" tests/system/test_same_bits.py tests/system/test_resume.py

parity: $(VENV)/installed $(TRL_VENV)/installed
	$(BIN)/python -m pytest -m parity -s tests/parity tests/benchmarks/test_against_trl.py

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_house.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.embedded_model

window: $(VENV)/installed
	$(BIN)/python -m benchmarks.window

saved-calls: $(VENV)/installed
	$(BIN)/python -m benchmarks.saved_calls

# ONLY=colocated prints that table alone; the names are those of --only.
overlap: $(VENV)/installed
	$(BIN)/python -m benchmarks.overlap $(if $(ONLY),--only $(ONLY))

broadcast: $(VENV)/installed
	$(BIN)/python -m benchmarks.broadcast

whole-network: $(VENV)/installed
	$(BIN)/python -m benchmarks.whole_network

# A tiny Wan that learns to move faster.
video-motion: $(VENV)/installed
	rm -rf runs/video-motion
	$(BIN)/python -m benchmarks.video_motion

# Kernels, bytes and host waits of a step, counted without a GPU.
step-counts: $(VENV)/installed
	$(BIN)/python -m benchmarks.step_counts

scale: $(VENV)/installed
	$(BIN)/python -m benchmarks.scale

rewards-bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.rewards

bench-trl: $(VENV)/installed $(TRL_VENV)/installed
	$(BIN)/python -m benchmarks.against_trl

bench-target: $(VENV)/installed $(TRL_VENV)/installed
	$(BIN)/python -m benchmarks.target --chart docs/against_trl.png

# Needs a GPU. TRL's environment uses the machine's torch.
bench-gpu: $(VENV)/installed $(TRL_VENV)/installed
	$(BIN)/python -m benchmarks.gpu --trl-python $(TRL_VENV)/bin/python

bench-gpu-families: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_families

# The difference between a bfloat16 sampler and a float32 learner under each choice of CPU kernels.
rounding: $(VENV)/installed
	$(BIN)/python -m benchmarks.rounding

soak: $(VENV)/installed
	rm -rf runs/soak
	$(BIN)/python -m benchmarks.soak --minutes 20

# SEED=7 repeats the schedules of that seed. Without SEED a random seed is used and printed.
chaos: $(VENV)/installed
	$(BIN)/python -m benchmarks.chaos $(if $(SEED),--seed $(SEED))

demo-seeds: $(VENV)/installed
	rm -rf runs/demo-seed*
	$(BIN)/python -m benchmarks.demo_seeds

lag-study: $(VENV)/installed
	$(BIN)/python -m benchmarks.lag_study --run --jobs 2
	$(BIN)/python -m benchmarks.lag_study --chart

algorithm-study: $(VENV)/installed
	$(BIN)/python -m benchmarks.algorithm_study --run --jobs 2
	$(BIN)/python -m benchmarks.algorithm_study_costs
	$(BIN)/python -m benchmarks.algorithm_study --chart

short-study: $(VENV)/installed
	$(BIN)/python -m benchmarks.short_study --run
	$(BIN)/python -m benchmarks.short_study --chart

edit-grey: $(VENV)/installed
	rm -rf runs/edit-grey
	$(BIN)/python -m benchmarks.edit_grey

three-steps: $(VENV)/installed
	rm -rf runs/three-steps
	$(BIN)/python -m benchmarks.three_steps --image runs/three-steps/before_after.png --runtime.threads 2

animal-reward: $(VENV)/installed
	rm -rf runs/tiny_animal_classifier
	$(BIN)/ddpo train deploy/recipes/tiny/animal_classifier.toml
	$(BIN)/ddpo report runs/tiny_animal_classifier

guard: $(VENV)/installed
	rm -rf runs/tiny_guard
	$(BIN)/ddpo train deploy/recipes/tiny/guard.toml
	$(BIN)/ddpo report runs/tiny_guard

held-out: $(VENV)/installed
	rm -rf runs/tiny_held_out
	$(BIN)/ddpo train deploy/recipes/tiny/held_out.toml
	$(BIN)/ddpo report runs/tiny_held_out

# The page and the JSON schema of all keys of a recipe, from the code.
configuration: $(VENV)/installed
	$(BIN)/python -m ray_ddpo.deploy.commands.config --page > docs/configuration.md
	$(BIN)/python -m ray_ddpo.deploy.commands.config --schema > deploy/recipes/recipe.schema.json

pretrain: $(VENV)/installed
	$(BIN)/python -m ray_ddpo.learner.pretraining.pretrain --output common/tiny_animals

# After an interruption: make pretrain-words OPTIONS=--resume
pretrain-words: $(VENV)/installed
	$(BIN)/python -m ray_ddpo.learner.pretraining.pretrain_words --output common/tiny_words $(OPTIONS)

# Stable Diffusion 1.5's architecture at 512 × 512 with random weights: two rounds through Ray, checkpoint, evaluation, report.
size-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.size_check --output runs/size-check

# docs/verification.md, from benchmarks/verification.toml and the recipes.
verification: $(VENV)/installed
	$(BIN)/python -m benchmarks.verification

site: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(TRL_VENV)/installed: tests/parity/requirements.txt constraints.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/parity/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(TRL_VENV) .venv-oldest runs site
