# Reading CUDA's headers and ours takes longer than compiling most kernels: small ones that share headers are compiled
# together, as one file each group (by nvcc from CMake 3.31 on; before, one by one). Of the directory that calls this.
function(group_cuda_kernels)
  set(gemm table device_check gemm_s8 gemm_channels linear_s8)
  set(attention qk_gemm pv_gemm qkv_bias qkv_bias_normalize head_scale_softmax)
  set(norm norm_shift_partition proj_bias_residual_norm proj_bias_norm_residual bias_norm_residual patch_merge_norm
           dequantize_norm patch_embed_norm bias_residual bias_gelu)
  set(rows dequantize patch_embed patch_merge shift_partition zero_padding final_norm_pool head)
  foreach(group gemm attention norm rows)
    foreach(kernel ${${group}})
      set_source_files_properties(${CMAKE_SOURCE_DIR}/csrc/cuda/${kernel}.cu PROPERTIES UNITY_GROUP ${group})
    endforeach()
  endforeach()
endfunction()
