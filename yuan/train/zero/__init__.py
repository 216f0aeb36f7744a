"""All that touches DeepSpeed: its engine, pipeline and ZeRO-1, and what is replaced in them.

Names of DeepSpeed that are not part of its documented interface, where they are, and why they are used or replaced.
`engine.check_deepspeed` refuses versions for which this list was not checked; `tests/yuan/test_deepspeed_names.py`
looks each name up, and looks for private names that are used and not listed.

deepspeed.ops
    __compatible_ops__  says that the shared-memory operation cannot be built, so that gloo is used and no compiler

deepspeed.runtime.pipe.engine.PipelineEngine
    _INSTRUCTION_MAP  wrapped: time each instruction, and say which one runs (stage_timer)
    _aggregate_total_loss  replaced: the loss is shared before the update, not once more after it (step)
    buffered_allreduce_fallback  replaced on one replica, where there is nothing to reduce (memory)
    reset_activation_shape  called: the next step may have another shape (step)

deepspeed.runtime.pipe.module.PipelineModule
    _partition_layers  overridden: cut where the plan says, for which there is no parameter, request #2974 (pipeline)
    _set_bounds  called by it
    _topo  read by it: which stage this rank is
    parts  set by it
    tied_modules  read: the embedding, which both ends hold (pipeline)

deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    bf16_groups  read: where the tied weight is (tied_embedding)
    fp32_groups_gradients  added to in place, instead of one gradient a micro-batch (tied_embedding)
    fp32_groups_has_gradients  set, since those are added to behind its back (tied_embedding)
    _hp_grad  set on the tied weight: where the engine adds the two ends up (tied_embedding)
    _global_grad_norm  read before the update (step)

deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    single_partition_of_fp32_groups  made views of the weights, which are fp32 themselves (memory)
    parallel_partitioned_bit16_groups  read: the weights that they become views of (memory)
    real_dp_process_group  read: which partition is this rank's (memory)
    _link_all_hp_params  called again after it: what it keeps by parameter were views of the copies (memory)
    _build_compact_grad_partition_buffer  called: the flat gradient that is added to in place (memory)
    flat_partition  read: that flat gradient (memory)
    bit16_groups  read: how many groups there are (memory)
    params_in_partition  read: whose parts the flat gradient has (memory)
    averaged_gradients  set to it (memory)
    zero_grad  replaced on one replica: clear the flat gradient, and keep it (memory)
    reduce_gradients  replaced on one replica: nothing to reduce (memory)
    get_grad_norm_direct  wrapped: square a block at a time, not a copy in fp64 of the whole (memory)
    _zero_padding  read of gradients: those that only pad (memory)
    _global_grad_norm  read before the update (step)

deepspeed.utils.tensor_fragment
    _hp_mapping  read of parameters: where the master weight and the moments of each are (optimizer_state)
    param_group_index  read of that: the group
    hp_fragment_address  read of that: the place in the flat master weight
    lp_fragment_address  read of that: which part of the parameter it is
"""
