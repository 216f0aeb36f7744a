"""All code that uses DeepSpeed: its engine, pipeline and ZeRO-1, and the parts of them that are replaced.

The list below has every DeepSpeed name that is not part of its documented interface, with its location and the reason
why it is used or replaced. `engine.check_deepspeed` rejects versions for which this list was not checked;
`tests/yuan/test_deepspeed_names.py` looks up each name, and searches for private names that are used but not listed.

deepspeed.ops
    __compatible_ops__  marks the shared-memory op as not buildable, so that gloo is used and no compiler

deepspeed.runtime.pipe.engine.PipelineEngine
    _INSTRUCTION_MAP  wrapped: time each instruction, and report which one runs (stage_timer)
    _aggregate_total_loss  replaced: the loss is reduced before the update, not again after it (step)
    buffered_allreduce_fallback  replaced on one replica, where there is nothing to reduce (memory)
    reset_activation_shape  called: the next step may have another shape (step)

deepspeed.runtime.pipe.module.PipelineModule
    _partition_layers  overridden: cut at the plan's bounds, for which there is no parameter, request #2974 (pipeline)
    _set_bounds  called by it
    _topo  read by it: the stage of this rank
    parts  set by it
    tied_modules  read: the embedding, which the first and last stage hold (pipeline)

deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    bf16_groups  read: group and index of the tied weight (tied_embedding)
    fp32_groups_gradients  added to in place, instead of one gradient per micro-batch (tied_embedding, memory)
    fp32_groups_has_gradients  set, since DeepSpeed does not see those additions (tied_embedding, memory)
    _update_hp_grad  replaced: add a gradient to its sum without a copy in fp32 (memory)
    _hp_grad  set on weights: the engine sums the first and last stage's of the tied weight (tied_embedding, memory)
    _global_grad_norm  read before the update (step)

deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer
    single_partition_of_fp32_groups  replaced by views of the weights, which are fp32 already (memory)
    parallel_partitioned_bit16_groups  read: the weights of which they become views (memory)
    real_dp_process_group  read: the partition of this rank (memory)
    _link_all_hp_params  called again after it: the fragments of each parameter were views of the copies (memory)
    _build_compact_grad_partition_buffer  called: creates the flat gradient that is added to in place (memory)
    flat_partition  read: that flat gradient (memory)
    bit16_groups  read: the number of groups (memory)
    params_in_partition  read: the parameters of the flat gradient's parts (memory)
    averaged_gradients  set to the flat gradient (memory)
    zero_grad  replaced on one replica: zero the flat gradient, and keep its memory (memory)
    reduce_gradients  replaced on one replica: nothing to reduce (memory)
    get_grad_norm_direct  wrapped: square one block at a time, instead of an fp64 copy of all (memory)
    _zero_padding  read of gradients: true for padding (memory)
    _global_grad_norm  read before the update (step)

deepspeed.utils.tensor_fragment
    _hp_mapping  read of parameters: location of their master weight and moments (optimizer_state)
    param_group_index  read of the mapping: the group
    hp_fragment_address  read of the mapping: the span in the flat master weight
    lp_fragment_address  read of the mapping: the span in the parameter
"""
