"""From text to shuffled activations: text -> language model -> harvest -> store on disk -> shuffle buffer."""
