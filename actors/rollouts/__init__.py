"""The rollout stream: which sampler and which reward worker gets which task, on Ray and in one process."""
