"""What `training.distill` is made of: its options, the teacher's trajectories, the student's schedule, the losses."""
