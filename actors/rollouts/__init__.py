"""The rollout stream: assign tasks to samplers and images to reward workers, on Ray and in one process."""
