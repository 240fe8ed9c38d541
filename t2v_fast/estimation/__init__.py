"""From a model and a loader to a diagonal Fisher.

``estimator`` has :func:`t2v_fast.fisher`. An estimator is a choice of ``cotangents`` of the logits, which depend on the
``likelihoods`` of the labels. ``batches`` runs the network, and ``self_check`` compares results with plain autograd.
``allocation`` decides which examples are visited, and ``tolerance`` how often. ``moments`` sums up, and ``diagonal``
holds the result. ``label_sets`` shares one forward pass between several tasks, ``variational`` has the robust Fisher,
and ``profiling`` measures where the time goes.
"""
