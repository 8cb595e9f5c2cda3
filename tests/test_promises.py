"""What a user is promised, and the test that holds us to it: one row a promise, by the file of its test."""

from pathlib import Path

import pytest

PROMISES = {
    "test_optimizers": {
        "the constructor has torch's signature, ours after it": "test_signature_is_torchs_and_ours_after_it",
    },
    "test_torch_inputs": {
        "what is accepted is honoured, as torch honours it": "test_input",
        "what torch refuses is refused": "test_error_input",
        "the schedules that torch tests these classes with": "test_schedules",
    },
    "test_errors": {
        "what is refused is refused with the remedy in the message": "test_refused_with_a_remedy",
        "an error names the tensor, and is raised before anything is written": "test_bad_tensor",
    },
    "test_paper_algorithms": {
        "decouple_lr=True is the paper's decay": "test_algorithm_1",
    },
    "test_training_loop": {
        "repr is torch's, and tells what runs": "test_repr_is_torchs",
        "closures": "test_a_closure_is_evaluated_anew_at_each_step",
        "hooks of the step": "test_hooks_see_and_change_the_step",
        "hooks of saving": "test_state_dict_hooks",
        "add_param_group": "test_groups_are_added_while_training",
        "zero_grad": "test_zero_grad",
        "the profiler names the step": "test_profiler_names_the_step",
        "named parameters": "test_named_parameters",
        "gradients with a graph of their own": "test_gradients_with_a_graph_of_their_own",
    },
    "test_lr_schedulers": {
        "every learning rate scheduler of torch": "test_scheduler",
        "lr as a float or a tensor, changed between steps": "test_lr_changes_its_kind_between_steps",
    },
    "test_averages": {
        "averages are those of torch's AveragedModel": "test_equals_torchs_averaged_model",
        "of the parameter before it is rounded": "test_an_average_takes_the_parameter_before_it_is_rounded",
        "in bfloat16 they have the mean of those in float32": "test_narrow_averages_follow_those_in_float32",
        "and nothing else changes a bit": "test_everything_else_keeps_its_bits",
        "a swap brings every bit back": "test_swapped",
    },
    "test_averaging": {
        "averaged models": "test_averaged_model",
        "optimizers around ours": "test_sam_around_ours",
        "and such that keep tensors in our state": "test_lookahead_around_ours",
    },
    "test_amp": {
        "a GradScaler's skip changes nothing and does not count": "test_grad_scaler",
        "unscale_ and clipping before the step": "test_grad_scaler_with_clipping_unscales_once",
        "several optimizers under one GradScaler": "test_an_infinity_in_one_of_two_optimizers",
        "autocast": "test_autocast_in_bf16",
    },
    "test_step_parameter": {
        "gradient release has the bits of a step": "test_step_parameter_has_the_bits_of_step",
        "from the hooks of autograd": "test_gradient_release",
        "tied weights": "test_gradient_release_of_tied_weights",
    },
    "test_compile": {
        "torch.compile of a training step": "test_torch_compile_of_a_training_step",
    },
    "test_allocations": {
        "a step allocates nothing after the first": "test_a_step_allocates_nothing_after_the_first",
        "nor on a GPU": "test_a_step_allocates_nothing_on_the_device_after_the_first",
    },
    "test_checkpoints": {
        "the groups have torch's keys": "test_groups_have_torchs_keys",
        "checkpoints of torch load, and ours load into torch": "test_a_run_goes_on_from_the_others_checkpoint",
        "so they do through torch.distributed.checkpoint": "test_distributed_checkpoints_of_torch",
        "resuming is exact, by whichever way the state was kept": "test_resume_is_exact",
        "a checkpoint moves between CPU and GPU": "test_from_the_cpu_to_a_gpu_and_back",
        "loading shares no tensor, keeps declared dtypes": "test_loading_shares_nothing_and_keeps_the_declared_dtypes",
        "loading keeps what is not ours, integers too": "test_loading_keeps_state_that_is_not_ours",
        "lr=0 changes no weight": "test_the_dummy_step_of_distributed_checkpoint_changes_no_weight",
        "hooks of loading": "test_loading_runs_the_users_hooks",
        "another optimizer's checkpoint is refused": (
            "test_another_optimizers_checkpoint_is_refused_and_changes_nothing"
        ),
        "steps counted in the group, as by apex and Megatron": "test_steps_that_are_counted_in_the_group",
        "parameters are matched by name": "test_parameters_in_another_order_are_matched_by_name",
    },
    "test_state": {
        "state can be made before the first step": "test_init_state_makes_what_the_first_step_would",
        "state that was cleared is forgotten": "test_state_that_was_cleared_is_forgotten",
        "moments are float32 unless declared otherwise": "test_moments_keep_the_dtype_they_were_declared_with",
        "the default dtype changes nothing": "test_the_default_dtype_changes_nothing",
        "a step in shared memory stays there": "test_a_step_of_one_element_keeps_its_memory",
    },
    "test_clipping": {
        "max_grad_norm is clip_grad_norm_ before a step": "test_equals_clip_grad_norm_and_a_step",
        "and writes no gradient": "test_equals_clip_grad_norm_and_a_step",
        "a skipped step changes nothing, over all tensors, the first one too": (
            "test_a_step_that_is_not_finite_is_skipped_whole"
        ),
        "a GradScaler's work within the step, with and without unscale_": "test_grad_scaler",
        "any found_inf but zero skips": "test_any_found_inf_but_zero_skips",
        "the norm and the skip need no synchronisation": "test_nothing_waits_for_the_device",
    },
    "test_plan": {
        "any mix of dtypes": "test_any_mix_of_dtypes",
        "any layout": "test_layouts",
        "any offset, and nothing beside a tensor is written": "test_sentinels",
        "gradients laid out unlike their parameter": "test_gradients_laid_out_unlike_the_parameter",
        "late and absent gradients": "test_late_and_absent_gradients",
        "frozen parameters": "test_frozen_parameters",
        "complex parameters are two reals": "test_complex_is_two_reals",
    },
    "test_launch": {
        "many tensors and many groups": "test_465_groups",
    },
    "test_formats": {
        "bfloat16 parameters decay, and take tiny updates": "test_weight_decay_in_bf16",
        "what rounding to nearest loses is told, once, with the cures": "test_what_is_lost_is_told_once",
        "random bits are those of seed, step, parameter and element": "test_words",
        "and do not depend on shards": "test_same_bits_for_any_split_into_shards",
        "split16 and fp32 masters train to the same bits": "test_split16_and_fp32_go_the_same_way",
        "a parameter that is overwritten counts": "test_a_parameter_that_is_overwritten_is_what_counts",
        "every format resumes exactly": "test_resume_is_exact",
        "every format loads every other": "test_every_format_loads_every_other",
        "and torch's state, and is exported to torch": "test_torchs_state_loads_and_ours_is_exported",
        "every format has the same bits on a GPU": "test_same_bits_as_the_cpu",
        "int8 moments follow float32 ones": "test_int8_moments_follow_float32_ones",
    },
    "test_gpu": {
        "several devices": "test_other_devices_than_the_current_one",
        "CUDA graphs replay with new hyperparameters": "test_captured_graph_replays_with_new_hyperparameters",
        "and go on from a loaded checkpoint": "test_captured_graph_goes_on_from_a_loaded_checkpoint",
        "a step does not synchronise": "test_a_steady_step_does_not_synchronise",
    },
    "integrations/test_transformers": {
        "HuggingFace's Trainer": "test_a_run_follows_torchs",
    },
    "integrations/test_accelerate": {
        "Accelerate": "test_a_run_follows_torchs",
        "Accelerate sees a skipped step": "test_a_skipped_step_is_seen",
    },
    "integrations/test_lightning": {
        "Lightning, with clipping and AMP": "test_a_run_follows_torchs",
    },
    "test_backends": {
        "a backend asked for runs, or raises with the reason": "test_without_the_extension_asking_for_it_raises",
        "a choice that is not the best warns once": "test_without_the_extension_it_works_and_warns_once",
        "python -m fused_adamw says what runs, and why not the others": "test_python_m_fused_adamw_says_why_not",
    },
    "test_step_cpu": {
        "the same bits for any number of threads": "test_same_bits_for_every_number_of_threads",
        "set_flush_denormal holds for all threads": "test_every_thread_flushes_as_the_caller_does",
        "any split into tensors": "test_same_bits_for_every_split",
        "with max_grad_norm but for the norm's last bits": "test_a_split_moves_the_norm_by_its_last_bits",
        "a forked process can step": "test_a_forked_process_steps",
    },
}


@pytest.mark.parametrize(
    ("file", "promise", "test"), [(f, *row) for f, rows in PROMISES.items() for row in rows.items()]
)
def test_the_promise_has_its_test(file, promise, test):
    assert f"\ndef {test}(" in (Path(__file__).parent / f"{file}.py").read_text()
