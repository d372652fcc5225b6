-- A database as schema version 0003 left it, written by commit fe797ec's own code: three runs and one
-- that was superseded, with NaN and infinite losses. Made once by sqlite3's iterdump; never edit it.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE artifact (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	stage TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	path TEXT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	bytes BIGINT NOT NULL, 
	parent_sha256 VARCHAR(64), 
	CONSTRAINT pk_artifact PRIMARY KEY (id), 
	CONSTRAINT fk_artifact_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_artifact_kind CHECK (kind IN ('adapter', 'merged_gguf', 'adapter_gguf', 'base_gguf', 'modelfile', 'base_model', 'dataset')), 
	CONSTRAINT ck_artifact_bytes_count CHECK (bytes BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_artifact_parent_sha256 CHECK (length(parent_sha256) = 64), 
	CONSTRAINT ck_artifact_sha256 CHECK (length(sha256) = 64), 
	CONSTRAINT uq_artifact_run_id_stage_path UNIQUE (run_id, stage, path)
);
INSERT INTO "artifact" VALUES(1,1,'export','base_gguf','gguf/base/0/model.gguf','37f8b6c490fe10a47eb8d6959808531f7bc0e5f5e7903640d5128adac601d202',9,'4f5bb533dc9a08cfd36c87f8bb3a5b08d3770bb7146376806be0615c8e1cd46e');
INSERT INTO "artifact" VALUES(2,1,'prepare_base','base_model','models/base/model.safetensors','4f5bb533dc9a08cfd36c87f8bb3a5b08d3770bb7146376806be0615c8e1cd46e',12,NULL);
INSERT INTO "artifact" VALUES(3,2,'train','adapter','adapters/baseline_lora/0/adapter_model.safetensors','ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09',23,NULL);
INSERT INTO "artifact" VALUES(4,2,'export','merged_gguf','gguf/baseline_lora/0/model.gguf','b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508',20,'ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09');
INSERT INTO "artifact" VALUES(5,3,'train','adapter','adapters/pure_grit/3/adapter_model.safetensors','b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad',19,NULL);
INSERT INTO "artifact" VALUES(6,3,'export','merged_gguf','gguf/pure_grit/3/model.gguf','5084bf954ba416020c9b4e46f170d9e8cd5e67147338b1fffb4827112808c418',16,'b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad');
INSERT INTO "artifact" VALUES(7,4,'train','adapter','adapters/baseline_lora/0/adapter_model.safetensors','ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09',23,NULL);
INSERT INTO "artifact" VALUES(8,4,'export','merged_gguf','gguf/baseline_lora/0/model.gguf','b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508',20,'ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09');
CREATE TABLE attempt (
	id TEXT NOT NULL, 
	stage TEXT NOT NULL, 
	arm TEXT, 
	seed BIGINT, 
	status TEXT NOT NULL, 
	error TEXT, 
	started DATETIME NOT NULL, 
	ended DATETIME, 
	host TEXT NOT NULL, 
	pid BIGINT NOT NULL, 
	git_commit TEXT, 
	CONSTRAINT pk_attempt PRIMARY KEY (id), 
	CONSTRAINT ck_attempt_named CHECK (id <> '' AND stage <> '' AND arm <> '' AND host <> ''), 
	CONSTRAINT ck_attempt_status CHECK (status IN ('running', 'finished', 'failed', 'crashed')), 
	CONSTRAINT ck_attempt_running_has_no_end CHECK (status <> 'running' OR ended IS NULL), 
	CONSTRAINT ck_attempt_ended_has_end CHECK (status NOT IN ('finished', 'failed') OR ended IS NOT NULL), 
	CONSTRAINT ck_attempt_ended_after_start CHECK (ended >= started), 
	CONSTRAINT ck_attempt_seed_count CHECK (seed BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_attempt_pid_count CHECK (pid BETWEEN 0 AND 9223372036854775807)
);
INSERT INTO "attempt" VALUES('one','train','baseline_lora',0,'finished',NULL,'2026-11-21 01:00:00.000000','2026-11-21 01:30:00.000000','somewhere',4242,'abc123');
INSERT INTO "attempt" VALUES('two','prepare_data',NULL,NULL,'crashed',NULL,'2026-11-21 01:00:00.000000',NULL,'somewhere',4242,'abc123');
CREATE TABLE environment (
	id INTEGER NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	device_class TEXT NOT NULL, 
	device_name TEXT, 
	cores BIGINT, 
	threads BIGINT, 
	memory_bytes BIGINT, 
	platform TEXT, 
	python TEXT, 
	packages JSON NOT NULL, 
	CONSTRAINT pk_environment PRIMARY KEY (id), 
	CONSTRAINT ck_environment_key_sha256 CHECK (length(key) = 64), 
	CONSTRAINT uq_environment_key UNIQUE ("key")
);
INSERT INTO "environment" VALUES(1,'9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5','cpu','Some CPU',2,2,8000000000,'Linux-6','3.11.7','{"torch": "2.13.0", "peft": "0.21.2"}');
CREATE TABLE layer_metric (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	split TEXT NOT NULL, 
	layer TEXT NOT NULL, 
	step BIGINT NOT NULL, 
	value DOUBLE, 
	value_kind TEXT NOT NULL, 
	CONSTRAINT pk_layer_metric PRIMARY KEY (id), 
	CONSTRAINT fk_layer_metric_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_layer_metric_named CHECK (name <> '' AND split <> '' AND layer <> ''), 
	CONSTRAINT ck_layer_metric_step CHECK (step BETWEEN -1 AND 9223372036854775807), 
	CONSTRAINT ck_layer_metric_value_kind CHECK (value_kind IN ('finite', 'nan', 'inf', '-inf')), 
	CONSTRAINT ck_layer_metric_value_typed CHECK ((value_kind = 'finite') = (value IS NOT NULL)), 
	CONSTRAINT ck_layer_metric_value_finite CHECK (value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308), 
	CONSTRAINT uq_layer_metric_run_id_name_split_layer_step UNIQUE (run_id, name, split, layer, step)
);
INSERT INTO "layer_metric" VALUES(1,1,'alignment_index','alignment','layer 2',-1,0.2,'finite');
INSERT INTO "layer_metric" VALUES(2,1,'xie_beni','alignment','layer 2',-1,NULL,'nan');
INSERT INTO "layer_metric" VALUES(3,2,'alignment_index','alignment','layer 2',-1,0.2,'finite');
INSERT INTO "layer_metric" VALUES(4,2,'xie_beni','alignment','layer 2',-1,NULL,'nan');
INSERT INTO "layer_metric" VALUES(5,2,'update_norm','weights','layers.0.self_attn.q_proj',-1,2.5,'finite');
INSERT INTO "layer_metric" VALUES(6,2,'update_norm','weights','layers.1.self_attn.v_proj',-1,1.5,'finite');
INSERT INTO "layer_metric" VALUES(7,2,'cos_raw_inner','probe','layers.0.self_attn.q_proj',0,1.0,'finite');
INSERT INTO "layer_metric" VALUES(8,2,'angle','probe','layers.0.self_attn.q_proj',25,26.5,'finite');
INSERT INTO "layer_metric" VALUES(9,2,'cos_raw_step','probe','layers.0.self_attn.q_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(10,2,'cos_raw_inner','probe','layers.0.self_attn.q_proj',25,0.75,'finite');
INSERT INTO "layer_metric" VALUES(11,2,'lr_ratio','probe','layers.0.self_attn.q_proj',25,1.25,'finite');
INSERT INTO "layer_metric" VALUES(12,2,'angle','probe','layers.1.self_attn.v_proj',25,13.25,'finite');
INSERT INTO "layer_metric" VALUES(13,2,'cos_raw_step','probe','layers.1.self_attn.v_proj',25,0.25,'finite');
INSERT INTO "layer_metric" VALUES(14,2,'cos_raw_inner','probe','layers.1.self_attn.v_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(15,2,'lr_ratio','probe','layers.1.self_attn.v_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(16,2,'rank','grit','layers.0.self_attn.q_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(17,2,'kept_rank','grit','layers.0.self_attn.q_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(18,2,'samples','grit','layers.0.self_attn.q_proj',0,412.0,'finite');
INSERT INTO "layer_metric" VALUES(19,2,'effective_rank_a','grit','layers.0.self_attn.q_proj',0,3.5,'finite');
INSERT INTO "layer_metric" VALUES(20,2,'condition_a','grit','layers.0.self_attn.q_proj',0,6.0,'finite');
INSERT INTO "layer_metric" VALUES(21,2,'rank','grit','layers.1.self_attn.v_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(22,2,'kept_rank','grit','layers.1.self_attn.v_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(23,2,'samples','grit','layers.1.self_attn.v_proj',0,0.0,'finite');
INSERT INTO "layer_metric" VALUES(24,2,'rank','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(25,2,'kept_rank_a','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(26,2,'kept_rank_b','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(27,2,'relative_change','grit','layers.0.self_attn.q_proj',20,NULL,'nan');
INSERT INTO "layer_metric" VALUES(28,2,'kept_rank','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(29,2,'samples','grit','layers.0.self_attn.q_proj',20,2030.0,'finite');
INSERT INTO "layer_metric" VALUES(30,2,'effective_rank_a','grit','layers.0.self_attn.q_proj',20,2.5,'finite');
INSERT INTO "layer_metric" VALUES(31,2,'condition_a','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(32,2,'condition_g','grit','layers.0.self_attn.q_proj',20,NULL,'inf');
INSERT INTO "layer_metric" VALUES(33,2,'rank','grit','layers.0.self_attn.q_proj',-1,3.0,'finite');
INSERT INTO "layer_metric" VALUES(34,2,'base_rank','grit','layers.0.self_attn.q_proj',-1,4.0,'finite');
INSERT INTO "layer_metric" VALUES(35,2,'kept_rank_a','grit','layers.0.self_attn.q_proj',-1,3.0,'finite');
INSERT INTO "layer_metric" VALUES(36,2,'kept_rank_b','grit','layers.0.self_attn.q_proj',-1,2.0,'finite');
INSERT INTO "layer_metric" VALUES(37,4,'alignment_index','alignment','layer 2',-1,0.2,'finite');
INSERT INTO "layer_metric" VALUES(38,4,'xie_beni','alignment','layer 2',-1,NULL,'nan');
INSERT INTO "layer_metric" VALUES(39,4,'update_norm','weights','layers.0.self_attn.q_proj',-1,2.5,'finite');
INSERT INTO "layer_metric" VALUES(40,4,'update_norm','weights','layers.1.self_attn.v_proj',-1,1.5,'finite');
INSERT INTO "layer_metric" VALUES(41,4,'cos_raw_inner','probe','layers.0.self_attn.q_proj',0,1.0,'finite');
INSERT INTO "layer_metric" VALUES(42,4,'angle','probe','layers.0.self_attn.q_proj',25,26.5,'finite');
INSERT INTO "layer_metric" VALUES(43,4,'cos_raw_step','probe','layers.0.self_attn.q_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(44,4,'cos_raw_inner','probe','layers.0.self_attn.q_proj',25,0.75,'finite');
INSERT INTO "layer_metric" VALUES(45,4,'lr_ratio','probe','layers.0.self_attn.q_proj',25,1.25,'finite');
INSERT INTO "layer_metric" VALUES(46,4,'angle','probe','layers.1.self_attn.v_proj',25,13.25,'finite');
INSERT INTO "layer_metric" VALUES(47,4,'cos_raw_step','probe','layers.1.self_attn.v_proj',25,0.25,'finite');
INSERT INTO "layer_metric" VALUES(48,4,'cos_raw_inner','probe','layers.1.self_attn.v_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(49,4,'lr_ratio','probe','layers.1.self_attn.v_proj',25,0.5,'finite');
INSERT INTO "layer_metric" VALUES(50,4,'rank','grit','layers.0.self_attn.q_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(51,4,'kept_rank','grit','layers.0.self_attn.q_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(52,4,'samples','grit','layers.0.self_attn.q_proj',0,412.0,'finite');
INSERT INTO "layer_metric" VALUES(53,4,'effective_rank_a','grit','layers.0.self_attn.q_proj',0,3.5,'finite');
INSERT INTO "layer_metric" VALUES(54,4,'condition_a','grit','layers.0.self_attn.q_proj',0,6.0,'finite');
INSERT INTO "layer_metric" VALUES(55,4,'rank','grit','layers.1.self_attn.v_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(56,4,'kept_rank','grit','layers.1.self_attn.v_proj',0,4.0,'finite');
INSERT INTO "layer_metric" VALUES(57,4,'samples','grit','layers.1.self_attn.v_proj',0,0.0,'finite');
INSERT INTO "layer_metric" VALUES(58,4,'rank','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(59,4,'kept_rank_a','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(60,4,'kept_rank_b','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(61,4,'relative_change','grit','layers.0.self_attn.q_proj',20,NULL,'nan');
INSERT INTO "layer_metric" VALUES(62,4,'kept_rank','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(63,4,'samples','grit','layers.0.self_attn.q_proj',20,2030.0,'finite');
INSERT INTO "layer_metric" VALUES(64,4,'effective_rank_a','grit','layers.0.self_attn.q_proj',20,2.5,'finite');
INSERT INTO "layer_metric" VALUES(65,4,'condition_a','grit','layers.0.self_attn.q_proj',20,3.0,'finite');
INSERT INTO "layer_metric" VALUES(66,4,'condition_g','grit','layers.0.self_attn.q_proj',20,NULL,'inf');
INSERT INTO "layer_metric" VALUES(67,4,'rank','grit','layers.0.self_attn.q_proj',-1,3.0,'finite');
INSERT INTO "layer_metric" VALUES(68,4,'base_rank','grit','layers.0.self_attn.q_proj',-1,4.0,'finite');
INSERT INTO "layer_metric" VALUES(69,4,'kept_rank_a','grit','layers.0.self_attn.q_proj',-1,3.0,'finite');
INSERT INTO "layer_metric" VALUES(70,4,'kept_rank_b','grit','layers.0.self_attn.q_proj',-1,2.0,'finite');
CREATE TABLE metric (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	split TEXT NOT NULL, 
	step BIGINT NOT NULL, 
	value DOUBLE, 
	value_kind TEXT NOT NULL, 
	n BIGINT, 
	CONSTRAINT pk_metric PRIMARY KEY (id), 
	CONSTRAINT fk_metric_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_metric_named CHECK (name <> '' AND split <> ''), 
	CONSTRAINT ck_metric_n_count CHECK (n BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_metric_step CHECK (step BETWEEN -1 AND 9223372036854775807), 
	CONSTRAINT ck_metric_value_kind CHECK (value_kind IN ('finite', 'nan', 'inf', '-inf')), 
	CONSTRAINT ck_metric_value_typed CHECK ((value_kind = 'finite') = (value IS NOT NULL)), 
	CONSTRAINT ck_metric_value_finite CHECK (value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308), 
	CONSTRAINT uq_metric_run_id_name_split_step UNIQUE (run_id, name, split, step)
);
INSERT INTO "metric" VALUES(1,1,'aqi_category_accuracy','test',-1,0.25,'finite',4);
INSERT INTO "metric" VALUES(2,1,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(3,1,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(4,1,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(5,1,'perplexity','general',-1,7.5,'finite',4000);
INSERT INTO "metric" VALUES(6,1,'alignment_index','alignment',-1,0.25,'finite',120);
INSERT INTO "metric" VALUES(7,2,'aqi_category_accuracy','test',-1,0.5,'finite',4);
INSERT INTO "metric" VALUES(8,2,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(9,2,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(10,2,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(11,2,'perplexity','general',-1,7.5,'finite',4000);
INSERT INTO "metric" VALUES(12,2,'alignment_index','alignment',-1,0.25,'finite',120);
INSERT INTO "metric" VALUES(13,2,'update_norm','weights',-1,3.5,'finite',NULL);
INSERT INTO "metric" VALUES(14,2,'drift_cosine','hidden',-1,0.01,'finite',4000);
INSERT INTO "metric" VALUES(15,2,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(16,2,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(17,2,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(18,2,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(19,2,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(20,2,'loss','train',20,NULL,'nan',NULL);
INSERT INTO "metric" VALUES(21,2,'loss','train',40,NULL,'-inf',NULL);
INSERT INTO "metric" VALUES(22,2,'loss','eval',30,NULL,'inf',NULL);
INSERT INTO "metric" VALUES(23,3,'aqi_category_accuracy','test',-1,0.75,'finite',4);
INSERT INTO "metric" VALUES(24,3,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(25,3,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(26,3,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(27,3,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(28,3,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(29,3,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(30,3,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(31,3,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(32,3,'epoch','train',10,0.1,'finite',NULL);
INSERT INTO "metric" VALUES(33,3,'loss','eval',10,1.2,'finite',NULL);
INSERT INTO "metric" VALUES(34,3,'epoch','eval',10,0.1,'finite',NULL);
INSERT INTO "metric" VALUES(35,4,'aqi_category_accuracy','test',-1,0.5,'finite',4);
INSERT INTO "metric" VALUES(36,4,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(37,4,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(38,4,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(39,4,'perplexity','general',-1,7.5,'finite',4000);
INSERT INTO "metric" VALUES(40,4,'alignment_index','alignment',-1,0.25,'finite',120);
INSERT INTO "metric" VALUES(41,4,'update_norm','weights',-1,3.5,'finite',NULL);
INSERT INTO "metric" VALUES(42,4,'drift_cosine','hidden',-1,0.01,'finite',4000);
INSERT INTO "metric" VALUES(43,4,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(44,4,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(45,4,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(46,4,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(47,4,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(48,4,'loss','train',20,NULL,'nan',NULL);
INSERT INTO "metric" VALUES(49,4,'loss','train',40,NULL,'-inf',NULL);
INSERT INTO "metric" VALUES(50,4,'loss','eval',30,NULL,'inf',NULL);
CREATE TABLE metric_def (
	name TEXT NOT NULL, 
	unit TEXT NOT NULL, 
	direction TEXT NOT NULL, 
	description TEXT NOT NULL, 
	CONSTRAINT pk_metric_def PRIMARY KEY (name), 
	CONSTRAINT ck_metric_def_direction CHECK (direction IN ('higher', 'lower', 'none')), 
	CONSTRAINT ck_metric_def_named CHECK (name <> '')
);
INSERT INTO "metric_def" VALUES('angle','degrees','none','between the step made and the step of plain AdamW, 0: the same direction');
INSERT INTO "metric_def" VALUES('cos_raw_step','cosine','none','of the raw gradient and the step made, sign turned');
INSERT INTO "metric_def" VALUES('cos_raw_inner','cosine','none','of the raw gradient and the one that the optimizer got');
INSERT INTO "metric_def" VALUES('lr_ratio','ratio','none','length of the step made over that of plain AdamW''s step');
INSERT INTO "metric_def" VALUES('rank','directions','none','rank of the adapter''s tensors');
INSERT INTO "metric_def" VALUES('base_rank','directions','none','rank that the adapter started with');
INSERT INTO "metric_def" VALUES('kept_rank','directions','none','directions that the last reprojection kept');
INSERT INTO "metric_def" VALUES('kept_rank_a','directions','none','directions kept on A''s side');
INSERT INTO "metric_def" VALUES('kept_rank_b','directions','none','directions kept on B''s side');
INSERT INTO "metric_def" VALUES('samples','tokens','none','tokens that a layer''s statistics have seen');
INSERT INTO "metric_def" VALUES('relative_change','ratio','lower','by a reprojection: ‖ΔW'' − ΔW‖ over ‖ΔW‖');
INSERT INTO "metric_def" VALUES('effective_rank_a','directions','none','exp of the entropy of the normalised eigenvalues of the covariance of A''s outputs');
INSERT INTO "metric_def" VALUES('condition_a','ratio','none','largest over smallest eigenvalue of the covariance of A''s outputs');
INSERT INTO "metric_def" VALUES('damping_share_a','ratio','none','damping over the mean eigenvalue of the covariance of A''s outputs');
INSERT INTO "metric_def" VALUES('effective_rank_g','directions','none','exp of the entropy of the normalised eigenvalues of the covariance of the gradients there');
INSERT INTO "metric_def" VALUES('condition_g','ratio','none','largest over smallest eigenvalue of the covariance of the gradients there');
INSERT INTO "metric_def" VALUES('damping_share_g','ratio','none','damping over the mean eigenvalue of the covariance of the gradients there');
INSERT INTO "metric_def" VALUES('aqi_category_accuracy','share','higher','right');
INSERT INTO "metric_def" VALUES('aqi_mae','AQI points','lower','distance');
INSERT INTO "metric_def" VALUES('retention_accuracy','share','higher','kept');
INSERT INTO "metric_def" VALUES('perplexity','','lower','exp of the mean loss');
INSERT INTO "metric_def" VALUES('update_norm','','none','‖ΔW‖_F');
CREATE TABLE probe (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	layer TEXT NOT NULL, 
	step BIGINT NOT NULL, 
	value DOUBLE, 
	value_kind TEXT NOT NULL, 
	threshold DOUBLE, 
	unit TEXT NOT NULL, 
	verdict TEXT NOT NULL, 
	diagnosis TEXT NOT NULL, 
	CONSTRAINT pk_probe PRIMARY KEY (id), 
	CONSTRAINT fk_probe_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_probe_named CHECK (name <> ''), 
	CONSTRAINT ck_probe_verdict CHECK (verdict IN ('pass', 'fail', 'inconclusive', 'skipped')), 
	CONSTRAINT ck_probe_step CHECK (step BETWEEN -1 AND 9223372036854775807), 
	CONSTRAINT ck_probe_value_kind CHECK (value_kind IN ('finite', 'nan', 'inf', '-inf')), 
	CONSTRAINT ck_probe_value_typed CHECK ((value_kind = 'finite') = (value IS NOT NULL)), 
	CONSTRAINT ck_probe_value_finite CHECK (value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308), 
	CONSTRAINT uq_probe_run_id_name_layer_step UNIQUE (run_id, name, layer, step)
);
INSERT INTO "probe" VALUES(1,2,'verdict','',-1,0.0,'finite',NULL,'','pass','no_effect: equals_shadow: because');
INSERT INTO "probe" VALUES(2,2,'angle_to_shadow','',-1,1.0e-05,'finite',1.0,'degrees','pass','');
INSERT INTO "probe" VALUES(3,2,'twin_divergence','',-1,0.0,'finite',10.0,'A/A floors','pass','');
INSERT INTO "probe" VALUES(4,2,'layer_angle','layers.0.q_proj',25,1.0e-05,'finite',NULL,'degrees','skipped','');
INSERT INTO "probe" VALUES(5,3,'verdict','',-1,1.0,'finite',NULL,'','pass','effective: none: because');
INSERT INTO "probe" VALUES(6,3,'angle_to_shadow','',-1,26.5,'finite',1.0,'degrees','pass','');
INSERT INTO "probe" VALUES(7,3,'twin_divergence','',-1,NULL,'inf',10.0,'A/A floors','pass','');
INSERT INTO "probe" VALUES(8,3,'layer_angle','layers.0.q_proj',25,26.5,'finite',NULL,'degrees','skipped','');
INSERT INTO "probe" VALUES(9,4,'verdict','',-1,0.0,'finite',NULL,'','pass','no_effect: equals_shadow: because');
INSERT INTO "probe" VALUES(10,4,'angle_to_shadow','',-1,1.0e-05,'finite',1.0,'degrees','pass','');
INSERT INTO "probe" VALUES(11,4,'twin_divergence','',-1,0.0,'finite',10.0,'A/A floors','pass','');
INSERT INTO "probe" VALUES(12,4,'layer_angle','layers.0.q_proj',25,1.0e-05,'finite',NULL,'degrees','skipped','');
CREATE TABLE quantization (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	type TEXT NOT NULL, 
	bytes BIGINT NOT NULL, 
	bits_per_weight DOUBLE NOT NULL, 
	tensor_types JSON NOT NULL, 
	category_accuracy DOUBLE NOT NULL, 
	correct BIGINT NOT NULL, 
	n BIGINT NOT NULL, 
	answers_equal_to_f16 DOUBLE NOT NULL, 
	fallbacks BIGINT NOT NULL, 
	CONSTRAINT pk_quantization PRIMARY KEY (id), 
	CONSTRAINT fk_quantization_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_quantization_named CHECK (type <> ''), 
	CONSTRAINT ck_quantization_bits_per_weight CHECK (bits_per_weight > 0 AND bits_per_weight <= 64), 
	CONSTRAINT ck_quantization_correct_of_n CHECK (correct <= n), 
	CONSTRAINT ck_quantization_f16_equals_itself CHECK (type <> 'f16' OR answers_equal_to_f16 = 1), 
	CONSTRAINT ck_quantization_bytes_count CHECK (bytes BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_quantization_correct_count CHECK (correct BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_quantization_n_count CHECK (n BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_quantization_fallbacks_count CHECK (fallbacks BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_quantization_category_accuracy_share CHECK (category_accuracy BETWEEN 0 AND 1), 
	CONSTRAINT ck_quantization_answers_equal_to_f16_share CHECK (answers_equal_to_f16 BETWEEN 0 AND 1), 
	CONSTRAINT uq_quantization_run_id_type UNIQUE (run_id, type)
);
INSERT INTO "quantization" VALUES(1,2,'f16',16000000,16.0,'{"F16": 15, "F32": 5}',0.5,2,4,1.0,0);
INSERT INTO "quantization" VALUES(2,2,'q8_0',8500000,8.5,'{"Q8_0": 15, "F32": 5}',0.25,1,4,0.75,0);
INSERT INTO "quantization" VALUES(3,4,'f16',16000000,16.0,'{"F16": 15, "F32": 5}',0.5,2,4,1.0,0);
INSERT INTO "quantization" VALUES(4,4,'q8_0',8500000,8.5,'{"Q8_0": 15, "F32": 5}',0.25,1,4,0.75,0);
CREATE TABLE quantized_sample (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	type TEXT NOT NULL, 
	item_id TEXT NOT NULL, 
	correct BOOLEAN NOT NULL, 
	answer TEXT NOT NULL, 
	CONSTRAINT pk_quantized_sample PRIMARY KEY (id), 
	CONSTRAINT fk_quantized_sample_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_quantized_sample_named CHECK (type <> '' AND item_id <> ''), 
	CONSTRAINT uq_quantized_sample_run_id_type_item_id UNIQUE (run_id, type, item_id), 
	CONSTRAINT ck_quantized_sample_correct_flag CHECK (correct IN (0, 1))
);
INSERT INTO "quantized_sample" VALUES(1,2,'f16','aqi-000000',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(2,2,'f16','aqi-000001',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(3,2,'f16','aqi-000002',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(4,2,'f16','aqi-000003',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(5,2,'q8_0','aqi-000000',1,'q8_0 True');
INSERT INTO "quantized_sample" VALUES(6,2,'q8_0','aqi-000001',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(7,2,'q8_0','aqi-000002',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(8,2,'q8_0','aqi-000003',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(9,4,'f16','aqi-000000',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(10,4,'f16','aqi-000001',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(11,4,'f16','aqi-000002',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(12,4,'f16','aqi-000003',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(13,4,'q8_0','aqi-000000',1,'q8_0 True');
INSERT INTO "quantized_sample" VALUES(14,4,'q8_0','aqi-000001',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(15,4,'q8_0','aqi-000002',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(16,4,'q8_0','aqi-000003',0,'q8_0 False');
CREATE TABLE run (
	id INTEGER NOT NULL, 
	run_key VARCHAR(64) NOT NULL, 
	source_sha256 VARCHAR(64) NOT NULL, 
	arm TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	model_name TEXT NOT NULL, 
	status TEXT NOT NULL, 
	is_current BOOLEAN NOT NULL, 
	error TEXT, 
	started DATETIME NOT NULL, 
	ended DATETIME, 
	stages JSON NOT NULL, 
	params JSON NOT NULL, 
	inputs JSON NOT NULL, 
	git_commit TEXT, 
	git_dirty BOOLEAN, 
	prompt_template TEXT, 
	backend_name TEXT NOT NULL, 
	backend_version TEXT NOT NULL, 
	device_class TEXT NOT NULL, 
	environment_id INTEGER NOT NULL, 
	test_items_sha256 VARCHAR(64) NOT NULL, 
	reference_run_id INTEGER, 
	parity_first_difference JSON, serving_mode TEXT DEFAULT 'merged' NOT NULL CONSTRAINT ck_run_serving_mode CHECK (serving_mode IN ('merged', 'adapter')), row_counts JSON, 
	CONSTRAINT pk_run PRIMARY KEY (id), 
	CONSTRAINT ck_run_named CHECK (arm <> '' AND model_name <> ''), 
	CONSTRAINT ck_run_base_has_no_reference CHECK (arm <> 'base' OR reference_run_id IS NULL), 
	CONSTRAINT ck_run_finished_has_end CHECK (status <> 'finished' OR ended IS NOT NULL), 
	CONSTRAINT ck_run_status CHECK (status IN ('running', 'finished', 'failed', 'crashed')), 
	CONSTRAINT ck_run_ended_after_start CHECK (ended >= started), 
	CONSTRAINT ck_run_run_key_sha256 CHECK (length(run_key) = 64), 
	CONSTRAINT ck_run_source_sha256 CHECK (length(source_sha256) = 64), 
	CONSTRAINT ck_run_test_items_sha256 CHECK (length(test_items_sha256) = 64), 
	CONSTRAINT ck_run_not_its_own_reference CHECK (reference_run_id <> id), 
	CONSTRAINT ck_run_seed_count CHECK (seed BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT fk_run_environment_id FOREIGN KEY(environment_id) REFERENCES environment (id) ON DELETE RESTRICT, 
	CONSTRAINT fk_run_reference_run_id FOREIGN KEY(reference_run_id) REFERENCES run (id) ON DELETE SET NULL, 
	CONSTRAINT uq_run_run_key UNIQUE (run_key), 
	CONSTRAINT ck_run_is_current_flag CHECK (is_current IN (0, 1)), 
	CONSTRAINT ck_run_git_dirty_flag CHECK (git_dirty IN (0, 1))
);
INSERT INTO "run" VALUES(1,'370df3cd177656fb06caa8c2d365d10c806507e1c7c7248fc5c4b7fb8c655a04','46375539a44a51febe508e6b6dee07de04949c6260707d010bd81494d263ba72','base',0,'base_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "measure": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"export": {"export": {"learning_rate": 0.001, "steps": 100}}, "measure": {"measure": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "measure": {}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/base/0/model.gguf": "37f8b6c490fe10a47eb8d6959808531f7bc0e5f5e7903640d5128adac601d202"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',NULL,NULL,'merged','{"metric": 6, "sample": 4, "speed": 3, "artifact": 2, "probe": 0, "quantization": 0, "quantized_sample": 0, "verification": 0, "layer_metric": 2, "spectrum": 0}');
INSERT INTO "run" VALUES(2,'20ee06c695839e97c9da644b712ff8975014c41f46e68178d1c656a16985d692','df42792464eeff04a96fe88b52f521be3073406984c6455bfb816b66fa6b6f1f','baseline_lora',0,'baseline_lora_model','finished',0,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "quantize": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "verify": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "measure": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.001, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "quantize": {"quantize": {"learning_rate": 0.001, "steps": 100}}, "verify": {"verify": {"learning_rate": 0.001, "steps": 100}}, "measure": {"measure": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "quantize": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}, "verify": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "measure": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09", "measured/base/0/measured.json": "f80e2e30110918a5ac0c0f181a7b52604b25c3f6e14e4d722a6800abe5937540"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged','{"metric": 16, "sample": 4, "speed": 5, "artifact": 2, "probe": 4, "quantization": 2, "quantized_sample": 8, "verification": 2, "layer_metric": 34, "spectrum": 3}');
INSERT INTO "run" VALUES(3,'76391c77ba8dc73b79d79de8e75de7c1a526d658696cb13a074c297348225d9e','4804241406ea59811985d83d0efc44d8c63b2bb3f9d4f1d257f5367591ec4a4f','pure_grit',3,'pure_grit_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.001, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/pure_grit/3/adapter_model.safetensors": "b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/pure_grit/3/model.gguf": "5084bf954ba416020c9b4e46f170d9e8cd5e67147338b1fffb4827112808c418"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged','{"metric": 12, "sample": 4, "speed": 5, "artifact": 2, "probe": 4, "quantization": 0, "quantized_sample": 0, "verification": 0, "layer_metric": 0, "spectrum": 0}');
INSERT INTO "run" VALUES(4,'8cfd73377dc380ec5af8145536b7a71a6ce36fc7e116cc2322a3c7c1c10b651e','2423c241d67ea57b7163456c0a6b4ab29890125b9f85d2ce1bb230ae45bee049','baseline_lora',0,'baseline_lora_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "quantize": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "verify": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "measure": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.01, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "quantize": {"quantize": {"learning_rate": 0.001, "steps": 100}}, "verify": {"verify": {"learning_rate": 0.001, "steps": 100}}, "measure": {"measure": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "quantize": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}, "verify": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "measure": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09", "measured/base/0/measured.json": "f80e2e30110918a5ac0c0f181a7b52604b25c3f6e14e4d722a6800abe5937540"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged','{"metric": 16, "sample": 4, "speed": 5, "artifact": 2, "probe": 4, "quantization": 2, "quantized_sample": 8, "verification": 2, "layer_metric": 34, "spectrum": 3}');
CREATE TABLE sample (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	item_id TEXT NOT NULL, 
	task TEXT NOT NULL, 
	split TEXT NOT NULL, 
	prompt TEXT NOT NULL, 
	truth TEXT NOT NULL, 
	answer TEXT NOT NULL, 
	predicted DOUBLE, 
	correct BOOLEAN NOT NULL, 
	abs_error DOUBLE, 
	prompt_tokens BIGINT, 
	answer_tokens BIGINT, 
	CONSTRAINT pk_sample PRIMARY KEY (id), 
	CONSTRAINT fk_sample_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_sample_named CHECK (item_id <> '' AND split <> '' AND task <> ''), 
	CONSTRAINT ck_sample_abs_error_finite CHECK (abs_error BETWEEN 0 AND 1.7976931348623157e308), 
	CONSTRAINT ck_sample_answer_tokens_count CHECK (answer_tokens BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_sample_predicted_finite CHECK (predicted BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308), 
	CONSTRAINT ck_sample_prompt_tokens_count CHECK (prompt_tokens BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT uq_sample_run_id_split_item_id UNIQUE (run_id, split, item_id), 
	CONSTRAINT ck_sample_correct_flag CHECK (correct IN (0, 1))
);
INSERT INTO "sample" VALUES(1,1,'aqi-000000','aqi','test','PM2.5 is 0','0','0',0.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(2,1,'aqi-000001','aqi','test','PM2.5 is 1','1','61',61.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(3,1,'aqi-000002','aqi','test','PM2.5 is 2','2','62',62.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(4,1,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(5,2,'aqi-000000','aqi','test','PM2.5 is 0','0','0',0.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(6,2,'aqi-000001','aqi','test','PM2.5 is 1','1','1',1.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(7,2,'aqi-000002','aqi','test','PM2.5 is 2','2','62',62.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(8,2,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(9,3,'aqi-000000','aqi','test','PM2.5 is 0','0','0',0.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(10,3,'aqi-000001','aqi','test','PM2.5 is 1','1','1',1.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(11,3,'aqi-000002','aqi','test','PM2.5 is 2','2','2',2.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(12,3,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(13,4,'aqi-000000','aqi','test','PM2.5 is 0','0','0',0.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(14,4,'aqi-000001','aqi','test','PM2.5 is 1','1','1',1.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(15,4,'aqi-000002','aqi','test','PM2.5 is 2','2','62',62.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(16,4,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
CREATE TABLE spectrum (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	layer TEXT NOT NULL, 
	factor TEXT NOT NULL, 
	step BIGINT NOT NULL, 
	eigenvalues JSON NOT NULL, 
	CONSTRAINT pk_spectrum PRIMARY KEY (id), 
	CONSTRAINT fk_spectrum_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_spectrum_named CHECK (layer <> ''), 
	CONSTRAINT ck_spectrum_factor CHECK (factor IN ('a', 'g')), 
	CONSTRAINT ck_spectrum_step CHECK (step BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_spectrum_eigenvalues_known CHECK (length(CAST(eigenvalues AS TEXT)) > 2), 
	CONSTRAINT uq_spectrum_run_id_layer_factor_step UNIQUE (run_id, layer, factor, step)
);
INSERT INTO "spectrum" VALUES(1,2,'layers.0.self_attn.q_proj','a',0,'[0.75, 0.5, 0.25, 0.125]');
INSERT INTO "spectrum" VALUES(2,2,'layers.0.self_attn.q_proj','a',20,'["inf", 1.5, 0.5]');
INSERT INTO "spectrum" VALUES(3,2,'layers.0.self_attn.q_proj','g',20,'[0.5, 0.25, 0.0]');
INSERT INTO "spectrum" VALUES(4,4,'layers.0.self_attn.q_proj','a',0,'[0.75, 0.5, 0.25, 0.125]');
INSERT INTO "spectrum" VALUES(5,4,'layers.0.self_attn.q_proj','a',20,'["inf", 1.5, 0.5]');
INSERT INTO "spectrum" VALUES(6,4,'layers.0.self_attn.q_proj','g',20,'[0.5, 0.25, 0.0]');
CREATE TABLE "speed" (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	arm TEXT NOT NULL, 
	phase TEXT NOT NULL, 
	repetition BIGINT NOT NULL, 
	tokens BIGINT, 
	nanoseconds BIGINT, 
	CONSTRAINT pk_speed PRIMARY KEY (id), 
	CONSTRAINT uq_speed_run_id_arm_phase_repetition UNIQUE (run_id, arm, phase, repetition), 
	CONSTRAINT fk_speed_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_speed_named CHECK (arm <> ''), 
	CONSTRAINT ck_speed_nanoseconds_count CHECK (nanoseconds BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_speed_tokens_count CHECK (tokens BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_speed_repetition_count CHECK (repetition BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_speed_phase CHECK (phase IN ('load', 'ttft', 'prefill', 'decode'))
);
INSERT INTO "speed" VALUES(1,1,'base','decode',0,166,2000000000);
INSERT INTO "speed" VALUES(2,1,'base','decode',1,334,2000000000);
INSERT INTO "speed" VALUES(3,1,'base','load',0,NULL,1000000000);
INSERT INTO "speed" VALUES(4,2,'baseline_lora','decode',0,200,3000000000);
INSERT INTO "speed" VALUES(5,2,'baseline_lora','decode',1,400,3000000000);
INSERT INTO "speed" VALUES(6,2,'base','decode',0,200,2500000000);
INSERT INTO "speed" VALUES(7,2,'base','decode',1,400,2500000000);
INSERT INTO "speed" VALUES(8,2,'baseline_lora','load',0,NULL,1000000000);
INSERT INTO "speed" VALUES(9,3,'pure_grit','decode',0,200,3000000000);
INSERT INTO "speed" VALUES(10,3,'pure_grit','decode',1,400,3000000000);
INSERT INTO "speed" VALUES(11,3,'base','decode',0,200,2500000000);
INSERT INTO "speed" VALUES(12,3,'base','decode',1,400,2500000000);
INSERT INTO "speed" VALUES(13,3,'pure_grit','load',0,NULL,1000000000);
INSERT INTO "speed" VALUES(14,4,'baseline_lora','decode',0,200,3000000000);
INSERT INTO "speed" VALUES(15,4,'baseline_lora','decode',1,400,3000000000);
INSERT INTO "speed" VALUES(16,4,'base','decode',0,200,2500000000);
INSERT INTO "speed" VALUES(17,4,'base','decode',1,400,2500000000);
INSERT INTO "speed" VALUES(18,4,'baseline_lora','load',0,NULL,1000000000);
CREATE TABLE verification (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	backend TEXT NOT NULL, 
	backend_version TEXT NOT NULL, 
	mode TEXT NOT NULL, 
	prompts BIGINT NOT NULL, 
	rendered DOUBLE, 
	counted DOUBLE, 
	answered DOUBLE, 
	equal_to_merged DOUBLE, 
	perturbed_noticed BOOLEAN, 
	first_difference TEXT, 
	gguf_sha256 VARCHAR(64) NOT NULL, 
	adapter_sha256 VARCHAR(64), 
	server_digest TEXT, 
	stored_sha256 TEXT, 
	CONSTRAINT pk_verification PRIMARY KEY (id), 
	CONSTRAINT fk_verification_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
	CONSTRAINT ck_verification_named CHECK (backend <> '' AND backend_version <> ''), 
	CONSTRAINT ck_verification_mode CHECK (mode IN ('merged', 'adapter')), 
	CONSTRAINT ck_verification_asked_or_unsupported CHECK ((prompts > 0) = (answered IS NOT NULL) AND (prompts > 0 OR (rendered IS NULL AND counted IS NULL))), 
	CONSTRAINT ck_verification_gguf_sha256 CHECK (length(gguf_sha256) = 64), 
	CONSTRAINT ck_verification_adapter_sha256 CHECK (length(adapter_sha256) = 64), 
	CONSTRAINT ck_verification_prompts_count CHECK (prompts BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_verification_rendered_share CHECK (rendered BETWEEN 0 AND 1), 
	CONSTRAINT ck_verification_counted_share CHECK (counted BETWEEN 0 AND 1), 
	CONSTRAINT ck_verification_answered_share CHECK (answered BETWEEN 0 AND 1), 
	CONSTRAINT ck_verification_equal_to_merged_share CHECK (equal_to_merged BETWEEN 0 AND 1), 
	CONSTRAINT uq_verification_run_id_backend_mode UNIQUE (run_id, backend, mode), 
	CONSTRAINT ck_verification_perturbed_noticed_flag CHECK (perturbed_noticed IN (0, 1))
);
INSERT INTO "verification" VALUES(1,2,'llama_cpp','0.3.36','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,NULL,NULL);
INSERT INTO "verification" VALUES(2,2,'ollama','0.32.0','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,'sha256:abc','87b04e58961f9a99d853d4046a0b5b793e7c3e4bbd21f5aca8fb17c20cdb1d8b');
INSERT INTO "verification" VALUES(3,4,'llama_cpp','0.3.36','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,NULL,NULL);
INSERT INTO "verification" VALUES(4,4,'ollama','0.32.0','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,'sha256:abc','87b04e58961f9a99d853d4046a0b5b793e7c3e4bbd21f5aca8fb17c20cdb1d8b');
CREATE INDEX ix_run_environment_id ON run (environment_id);
CREATE INDEX ix_run_reference_run_id ON run (reference_run_id);
CREATE UNIQUE INDEX uq_run_current ON run (arm, seed) WHERE is_current;
CREATE INDEX ix_artifact_sha256 ON artifact (sha256);
CREATE VIEW v_leaderboard AS
WITH decode AS (
    SELECT run_id, arm, 1e9 * CAST(SUM(tokens) AS DOUBLE PRECISION) / NULLIF(SUM(nanoseconds), 0) AS rate
    FROM speed
    WHERE phase = 'decode' AND tokens IS NOT NULL AND nanoseconds IS NOT NULL
    GROUP BY run_id, arm
),
final AS (
    SELECT run_id, name, split, value FROM metric WHERE step = -1
)
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    100.0 * aqi.value AS aqi_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (aqi.value - base_aqi.value) END AS delta_aqi,
    100.0 * retention.value AS retention_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (retention.value - base_retention.value) END
        AS delta_retention,
    own.rate AS inference_speed,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE own.rate - beside.rate END AS delta_speed,
    100.0 * token_ids.value AS token_ids_equal,
    100.0 * greedy.value AS greedy_equal,
    run.backend_name,
    run.device_class,
    run.git_commit,
    run.git_dirty,
    run.started,
    run.ended
FROM run
LEFT JOIN final AS aqi
    ON aqi.run_id = run.id AND aqi.name = 'aqi_category_accuracy' AND aqi.split = 'test'
LEFT JOIN final AS base_aqi
    ON base_aqi.run_id = run.reference_run_id AND base_aqi.name = 'aqi_category_accuracy'
    AND base_aqi.split = 'test'
LEFT JOIN final AS retention
    ON retention.run_id = run.id AND retention.name = 'retention_accuracy'
    AND retention.split = 'retention'
LEFT JOIN final AS base_retention
    ON base_retention.run_id = run.reference_run_id AND base_retention.name = 'retention_accuracy'
    AND base_retention.split = 'retention'
LEFT JOIN final AS token_ids
    ON token_ids.run_id = run.id AND token_ids.name = 'token_ids_equal' AND token_ids.split = 'parity'
LEFT JOIN final AS greedy
    ON greedy.run_id = run.id AND greedy.name = 'greedy_equal' AND greedy.split = 'parity'
LEFT JOIN decode AS own ON own.run_id = run.id AND own.arm = run.arm
LEFT JOIN decode AS beside ON beside.run_id = run.id AND beside.arm = 'base'
WHERE run.is_current AND run.status = 'finished';
CREATE VIEW evaluation_results AS
SELECT
    model_name,
    aqi_accuracy,
    delta_aqi,
    inference_speed,
    delta_speed,
    replace(ended, ' ', 'T') || '+00:00' AS timestamp
FROM v_leaderboard;
CREATE VIEW v_probe_summary AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    probe.name AS probe,
    COUNT(*) AS readings,
    COUNT(DISTINCT probe.layer) AS layers,
    SUM(CASE WHEN probe.verdict = 'pass' THEN 1 ELSE 0 END) AS passed,
    SUM(CASE WHEN probe.verdict = 'fail' THEN 1 ELSE 0 END) AS failed,
    SUM(CASE WHEN probe.value_kind <> 'finite' THEN 1 ELSE 0 END) AS not_finite,
    MIN(probe.value) AS lowest,
    MAX(probe.value) AS highest,
    CASE
        WHEN SUM(CASE WHEN probe.verdict = 'fail' THEN 1 ELSE 0 END) > 0 THEN 'fail'
        WHEN SUM(CASE WHEN probe.verdict = 'pass' THEN 1 ELSE 0 END) = COUNT(*) THEN 'pass'
        ELSE 'inconclusive'
    END AS verdict
FROM run
JOIN probe ON probe.run_id = run.id
WHERE run.is_current AND run.status = 'finished'
GROUP BY run.id, run.arm, run.seed, run.model_name, probe.name;
CREATE VIEW v_parity AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    CASE WHEN metric.name = 'greedy_equal' THEN 'all' ELSE substr(metric.name, 6) END AS pair,
    100.0 * metric.value AS greedy_equal,
    100.0 * token_ids.value AS token_ids_equal,
    metric.n AS prompts
FROM run
JOIN metric ON metric.run_id = run.id AND metric.split = 'parity' AND metric.step = -1
    AND (metric.name = 'greedy_equal' OR metric.name LIKE 'pair/%')
LEFT JOIN metric AS token_ids
    ON token_ids.run_id = run.id AND token_ids.split = 'parity' AND token_ids.step = -1
    AND token_ids.name = 'token_ids_equal'
WHERE run.is_current AND run.status = 'finished';
CREATE VIEW v_quantization AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    quantization.type,
    CAST(quantization.bytes AS DOUBLE PRECISION) / 1e6 AS megabytes,
    quantization.bits_per_weight,
    100.0 * quantization.category_accuracy AS aqi_accuracy,
    100.0 * (quantization.category_accuracy - reference.category_accuracy) AS delta_f16,
    100.0 * quantization.answers_equal_to_f16 AS answers_equal_to_f16,
    quantization.n,
    quantization.fallbacks
FROM run
JOIN quantization ON quantization.run_id = run.id
LEFT JOIN quantization AS reference ON reference.run_id = run.id AND reference.type = 'f16'
WHERE run.is_current AND run.status = 'finished';
CREATE VIEW v_verification AS
SELECT
    run.id AS run_id,
    run.arm,
    run.seed,
    run.model_name,
    verification.backend,
    verification.backend_version,
    verification.mode,
    verification.prompts,
    100.0 * verification.rendered AS rendered,
    100.0 * verification.counted AS counted,
    100.0 * verification.answered AS answered,
    100.0 * verification.equal_to_merged AS equal_to_merged,
    verification.perturbed_noticed,
    verification.first_difference
FROM run
JOIN verification ON verification.run_id = run.id
WHERE run.is_current AND run.status = 'finished';
CREATE VIEW v_attempts AS
WITH ordered AS (
    SELECT
        stage,
        arm,
        seed,
        status,
        error,
        started,
        ROW_NUMBER() OVER (PARTITION BY stage, arm, seed ORDER BY started DESC, id DESC) AS place
    FROM attempt
)
SELECT
    stage,
    arm,
    seed,
    COUNT(*) AS starts,
    SUM(CASE WHEN status = 'finished' THEN 1 ELSE 0 END) AS finished,
    SUM(CASE WHEN status = 'failed' THEN 1 ELSE 0 END) AS failed,
    SUM(CASE WHEN status = 'crashed' THEN 1 ELSE 0 END) AS crashed,
    SUM(CASE WHEN status = 'running' THEN 1 ELSE 0 END) AS running,
    MAX(CASE WHEN place = 1 THEN status END) AS last_status,
    MAX(CASE WHEN place = 1 THEN error END) AS last_error,
    MAX(started) AS last_started
FROM ordered
GROUP BY stage, arm, seed;
COMMIT;
