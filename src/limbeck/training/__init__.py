"""Training: from a teacher to a trained and exported student.

The road from the command line to the loss of a layer, in calls:

    cli.distill              limbeck distill recipe.yaml
    pipeline.distill         set up, plan, rehearse, train, export: the job in one screen
    |  setup.prepare_job     checks the recipe; loads teacher, tokenizer and text
    |  plan, rehearsal       what it will cost, measured on one step of each stage
    |  run_directory         log, checkpoints, results of stages: what a run resumes from
    stages.run_stages        the stages of the recipe in order, skipping finished ones
    |  calibration           stage 0: output projections by least squares, no gradient
    |  guard                 takes back a stage that made the student worse (keep_better)
    trainer.Trainer.train    the loop of stages 1 to 3: step, log, checkpoint
    |  stage_protocol        what a stage is to the trainer, and its counts and gradients in a step
    Trainer.train_step       batches, forward, loss, backward; then clipping and optimizer
    |  optim                 optimizer, schedule, averages, loss scale, early stopping
    alignment                stage 1 (mixing matrices), stage 2 (hidden states), layer by layer
    logit_distillation       stage 3: the whole student on labels and the teacher's logits
    losses, chunked_losses   the losses themselves
    export                   saves, checks and evaluates the student

Beside it: joint_trainer (several students on the same passes of the teacher), teacher_cache (stage 3 without running
the teacher), lora, fsdp, lr_finder, layer_selection, pretraining (small teachers).
"""
