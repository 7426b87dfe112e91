"""Names that other programs have for our settings, and settings that are expected here and do not exist.

Each gets an answer of one sentence, the same for a flag, a YAML key and a keyword.
"""

from collections.abc import Collection

OTHER_NAMES = {
    "accumulate": "accum_iter accumulation_steps grad_accum grad_accumulation grad_accum_steps gradient_accumulation_steps",
    "advisor_lr": "meta_lr lr_meta advisor_learning_rate",
    "amp": "fp16 bf16 half mixed_precision precision autocast use_amp",
    "approx_meta": "approx approximate famus",
    "auto_augment": "aa autoaugment randaugment rand_augment trivialaugment",
    "batch_size": "b bs batch batchsize train_batch_size per_device_train_batch_size",
    "beta_probability": "beta rho",
    "clip_grad_norm": "clip grad_clip clip_grad gradient_clip gradient_clip_val max_grad_norm max_norm clip_norm",
    "config": "cfg config_file c",
    "data_root": "data data_dir datadir data_path dataset_dir dataset_path data_folder root path train_dir",
    "dataset": "ds dataset_name",
    "deterministic": "cudnn_deterministic",
    "download": "dataset_download",
    "ema_decay": "ema model_ema ema_momentum",
    "epochs": "e n_epochs num_epochs max_epochs nepochs",
    "eval_batch_size": "test_batch_size val_batch_size validation_batch_size",
    "image_size": "img_size imgsz input_size resolution crop_size",
    "imbalance_factor": "imbalance imb imb_factor imb_ratio imbalance_ratio lt_factor",
    "iterations": "iters max_iters max_iterations max_steps num_steps steps total_steps",
    "keep": "checkpoint_hist save_total_limit",
    "labels": "label_file labels_file noisy_labels",
    "lr": "learning_rate learningrate base_lr lr0 initial_lr",
    "lr_decay": "gamma decay_rate lr_gamma lr_drop",
    "meta_per_class": "num_meta meta_size n_meta meta_images clean_per_class",
    "milestones": "lr_steps lr_milestones decay_epochs",
    "model": "arch architecture backbone net network model_name",
    "momentum": "mom",
    "noise": "noise_type noise_mode corruption corruption_type",
    "noise_rate": "noise_ratio noise_prob corruption_prob corruption_ratio label_noise r",
    "optimizer": "opt optim optimiser",
    "output": "o out out_dir outdir output_dir save_dir log_dir logdir run_dir exp_dir checkpoint_dir save_path",
    "pretrained": "pretrain imagenet_pretrained",
    "save_every": "save_steps checkpoint_interval save_interval",
    "schedule": "lr_schedule lr_scheduler scheduler sched lr_policy",
    "seed": "random_seed manual_seed",
    "sync_bn": "syncbn sync_batchnorm",
    "test_list": "test_file test_csv",
    "train_list": "train_file train_csv",
    "warmup_epochs": "warmup warm_up",
    "weight_decay": "wd decay l2",
    "weights": "checkpoint ckpt init load initial_checkpoint finetune_from start_from",
    "workers": "j num_workers n_workers threads dataloader_num_workers",
}
"""For each of our settings, the names that other programs use for it."""

ONE_GPU = (
    "--device cuda takes the GPU, CUDA_VISIBLE_DEVICES=1 before the command says which, and "
    "'torchrun --nproc-per-node 2 -m fastadvisor train' takes two of them."
)
NO_LOGGER = "there is no such logger; metrics.jsonl in the run folder has a line an epoch, and there are TensorBoard files."
NO_STOPPING = "there is no early stopping; best.pt keeps the best epoch, chosen by the images of val/ where there are some."
NO_MIXING = "there is no mixing of images; --auto-augment and --cutout vary them."

ANSWERS = {
    "gpu gpus gpu_id gpu_ids cuda use_cuda ngpus num_gpus devices": ONE_GPU,
    "local_rank world_size nproc nproc_per_node distributed ddp dist rank multi_gpu": (
        "several processes are started by torchrun, as in 'torchrun --nproc-per-node 2 -m fastadvisor train'."
    ),
    "cpu no_cuda": "--device cpu computes on the CPU.",
    "patience early_stopping early_stop earlystopping": NO_STOPPING,
    "wandb wandb_project log_wandb use_wandb mlflow comet neptune clearml": NO_LOGGER,
    "mixup cutmix mixup_alpha cutmix_alpha mix": NO_MIXING,
    "label_smoothing smoothing": "labels are not smoothed here; --method mes learns how far to soften the softmax.",
    "dropout drop drop_rate drop_path": "dropout belongs to the model, and is as --model has it.",
    "loss criterion loss_function": "--method chooses the loss.",
    "class_weights class_weight weighted": "there are no fixed class weights; --method mw-net or l2rw learns one a sample.",
    "lr_min min_lr eta_min": "--schedule cosine ends at 0; there is no other floor.",
    "freeze freeze_backbone linear_probe": (
        "--method crt trains the head alone in its second part; --layer-decay slows the lower layers down."
    ),
    "compile torch_compile": "torch.compile is not used.",
    "fold folds kfold k_fold cv": "there is no cross-validation; fastadvisor compare --seeds repeats a run with other seeds.",
    "val_split validation_split val_size val_fraction": (
        "no validation images are held out; put them in val/ beside test/, and the best epoch is chosen by them."
    ),
    "verbose quiet silent q v": "--no-progress leaves the result alone.",
    "rotation color_jitter vertical_flip augment augmentation transforms": (
        "the augmentations are --crop, --horizontal-flip, --auto-augment and --cutout."
    ),
    "task": "there is one task, classification; --dataset and --method choose what of it.",
}
"""Answer for each group of names, which are separated by spaces."""


def answer_near_miss(name: str, known: Collection[str]) -> str | None:
    """Return a sentence on the setting ``name``, which is none of ours, or None where nothing is known of it.

    Args:
        name: as it was typed, with or without dashes.
        known: the settings that there are.
    """
    plain = name.strip("-").replace("-", "_").lower()
    for ours, others in OTHER_NAMES.items():
        if plain in others.split() and (ours in known or ours == "config"):
            return f"it is called --{ours.replace('_', '-')} here."
    for names, answer in ANSWERS.items():
        if plain in names.split() or plain.removeprefix("no_") in names.split():
            return answer
    return None
