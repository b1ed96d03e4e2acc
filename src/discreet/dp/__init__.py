"""Differential privacy for training: who takes part, whose gradient counts how much, how much noise, and what that costs.

    mechanism.calibrate -> Plan                     sampler, clip, noise and event, bound together
    sampling.poisson    -> positions                who takes part in this step
    clipping.clipped_sum -> ClippedSum              what they may say
    noise.add           -> Noised                   what leaves
    accounting.guarantee -> Guarantee               what it costs

Mathematics only: no files, no network, no configuration, no transformers. Nothing here is imported eagerly, so that accounting works without torch.
"""
