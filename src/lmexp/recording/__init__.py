"""What a run leaves: folder, metrics, pictures, video, tracker mirrors."""
