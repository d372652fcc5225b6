-- A database as schema version 0002 left it, written by commit eb95f0d's own code: three runs and one
-- that was superseded, with NaN and infinite losses. Made once by sqlite3's iterdump; never edit it.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
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
INSERT INTO "artifact" VALUES(7,4,'train','adapter','adapters/baseline_lora/0/adapter_model.safetensors','ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09',23,NULL);
INSERT INTO "artifact" VALUES(8,4,'export','merged_gguf','gguf/baseline_lora/0/model.gguf','b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508',20,'ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09');
INSERT INTO "artifact" VALUES(9,3,'train','adapter','adapters/pure_grit/3/adapter_model.safetensors','b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad',19,NULL);
INSERT INTO "artifact" VALUES(10,3,'export','merged_gguf','gguf/pure_grit/3/model.gguf','5084bf954ba416020c9b4e46f170d9e8cd5e67147338b1fffb4827112808c418',16,'b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad');
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
INSERT INTO "metric" VALUES(5,2,'aqi_category_accuracy','test',-1,0.5,'finite',4);
INSERT INTO "metric" VALUES(6,2,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(7,2,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(8,2,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(9,2,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(10,2,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(11,2,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(12,2,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(13,2,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(14,2,'loss','train',20,NULL,'nan',NULL);
INSERT INTO "metric" VALUES(15,2,'loss','eval',30,NULL,'inf',NULL);
INSERT INTO "metric" VALUES(16,2,'loss','train',40,NULL,'-inf',NULL);
INSERT INTO "metric" VALUES(29,4,'aqi_category_accuracy','test',-1,0.5,'finite',4);
INSERT INTO "metric" VALUES(30,4,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(31,4,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(32,4,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(33,4,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(34,4,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(35,4,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(36,4,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(37,4,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(38,4,'loss','train',20,NULL,'nan',NULL);
INSERT INTO "metric" VALUES(39,4,'loss','eval',30,NULL,'inf',NULL);
INSERT INTO "metric" VALUES(40,4,'loss','train',40,NULL,'-inf',NULL);
INSERT INTO "metric" VALUES(41,3,'aqi_category_accuracy','test',-1,0.75,'finite',4);
INSERT INTO "metric" VALUES(42,3,'aqi_mae','test',-1,4.5,'finite',4);
INSERT INTO "metric" VALUES(43,3,'retention_accuracy','retention',-1,0.8,'finite',50);
INSERT INTO "metric" VALUES(44,3,'retention/addition','retention',-1,0.8,'finite',25);
INSERT INTO "metric" VALUES(45,3,'token_ids_equal','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(46,3,'greedy_equal','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(47,3,'pair/hf/merged_gguf','parity',-1,1.0,'finite',100);
INSERT INTO "metric" VALUES(48,3,'pair/hf/base+adapter_gguf','parity',-1,0.99,'finite',100);
INSERT INTO "metric" VALUES(49,3,'loss','train',10,1.5,'finite',NULL);
INSERT INTO "metric" VALUES(50,3,'epoch','train',10,0.1,'finite',NULL);
INSERT INTO "metric" VALUES(51,3,'loss','eval',10,1.2,'finite',NULL);
INSERT INTO "metric" VALUES(52,3,'epoch','eval',10,0.1,'finite',NULL);
CREATE TABLE metric_def (
	name TEXT NOT NULL, 
	unit TEXT NOT NULL, 
	direction TEXT NOT NULL, 
	description TEXT NOT NULL, 
	CONSTRAINT pk_metric_def PRIMARY KEY (name), 
	CONSTRAINT ck_metric_def_direction CHECK (direction IN ('higher', 'lower', 'none')), 
	CONSTRAINT ck_metric_def_named CHECK (name <> '')
);
INSERT INTO "metric_def" VALUES('aqi_category_accuracy','share','higher','right');
INSERT INTO "metric_def" VALUES('aqi_mae','AQI points','lower','distance');
INSERT INTO "metric_def" VALUES('retention_accuracy','share','higher','kept');
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
INSERT INTO "probe" VALUES(9,4,'verdict','',-1,0.0,'finite',NULL,'','pass','no_effect: equals_shadow: because');
INSERT INTO "probe" VALUES(10,4,'angle_to_shadow','',-1,1.0e-05,'finite',1.0,'degrees','pass','');
INSERT INTO "probe" VALUES(11,4,'twin_divergence','',-1,0.0,'finite',10.0,'A/A floors','pass','');
INSERT INTO "probe" VALUES(12,4,'layer_angle','layers.0.q_proj',25,1.0e-05,'finite',NULL,'degrees','skipped','');
INSERT INTO "probe" VALUES(13,3,'verdict','',-1,1.0,'finite',NULL,'','pass','effective: none: because');
INSERT INTO "probe" VALUES(14,3,'angle_to_shadow','',-1,26.5,'finite',1.0,'degrees','pass','');
INSERT INTO "probe" VALUES(15,3,'twin_divergence','',-1,NULL,'inf',10.0,'A/A floors','pass','');
INSERT INTO "probe" VALUES(16,3,'layer_angle','layers.0.q_proj',25,26.5,'finite',NULL,'degrees','skipped','');
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
INSERT INTO "quantization" VALUES(1,4,'f16',16000000,16.0,'{"F16": 15, "F32": 5}',0.5,2,4,1.0,0);
INSERT INTO "quantization" VALUES(2,4,'q8_0',8500000,8.5,'{"Q8_0": 15, "F32": 5}',0.25,1,4,0.75,0);
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
INSERT INTO "quantized_sample" VALUES(1,4,'f16','aqi-000000',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(2,4,'f16','aqi-000001',1,'f16 True');
INSERT INTO "quantized_sample" VALUES(3,4,'f16','aqi-000002',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(4,4,'f16','aqi-000003',0,'f16 False');
INSERT INTO "quantized_sample" VALUES(5,4,'q8_0','aqi-000000',1,'q8_0 True');
INSERT INTO "quantized_sample" VALUES(6,4,'q8_0','aqi-000001',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(7,4,'q8_0','aqi-000002',0,'q8_0 False');
INSERT INTO "quantized_sample" VALUES(8,4,'q8_0','aqi-000003',0,'q8_0 False');
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
	parity_first_difference JSON, serving_mode TEXT DEFAULT 'merged' NOT NULL CONSTRAINT ck_run_serving_mode CHECK (serving_mode IN ('merged', 'adapter')), 
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
INSERT INTO "run" VALUES(1,'370df3cd177656fb06caa8c2d365d10c806507e1c7c7248fc5c4b7fb8c655a04','cfd84f6223b039a5c9dcc0865752adcdc38a3663bc03c9cf624672a2c9e40c40','base',0,'base_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"export": {"export": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/base/0/model.gguf": "37f8b6c490fe10a47eb8d6959808531f7bc0e5f5e7903640d5128adac601d202"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',NULL,NULL,'merged');
INSERT INTO "run" VALUES(2,'20ee06c695839e97c9da644b712ff8975014c41f46e68178d1c656a16985d692','e0319fcc7a694b7bcd5191859f4c38cafb763c8d808d2ca8016af9c4c7ed4049','baseline_lora',0,'baseline_lora_model','finished',0,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.001, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged');
INSERT INTO "run" VALUES(3,'76391c77ba8dc73b79d79de8e75de7c1a526d658696cb13a074c297348225d9e','2e2d480ef39a95e8eee41d9ce3505947e6c12f4508a1b0994773e4848f1676a2','pure_grit',3,'pure_grit_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.001, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/pure_grit/3/adapter_model.safetensors": "b7ce0de34de846fa98743fe252d66bca4a8cfccac4a7b5b8f6bed3ab92e8f0ad"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/pure_grit/3/model.gguf": "5084bf954ba416020c9b4e46f170d9e8cd5e67147338b1fffb4827112808c418"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged');
INSERT INTO "run" VALUES(4,'8cfd73377dc380ec5af8145536b7a71a6ce36fc7e116cc2322a3c7c1c10b651e','db140afc840f08957ff9874a11ef91a6a0df5feb682badd2914d76c98beaf27e','baseline_lora',0,'baseline_lora_model','finished',1,NULL,'2026-11-21 03:00:00.123456','2026-11-21 03:30:00.000000','{"train": {"started": "2026-11-21T01:00:00.123456+00:00", "ended": "2026-11-21T01:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "probe": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "export": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "quantize": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "verify": {"started": "2026-11-21T02:00:00.123456+00:00", "ended": "2026-11-21T02:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}, "evaluate": {"started": "2026-11-21T03:00:00.123456+00:00", "ended": "2026-11-21T03:30:00+00:00", "git_commit": "abc123", "git_dirty": false, "environment": "9562f0d74c0bce35f6b0a5926c0a25063d01ba5e2f43dbf2a1a838c30c7e62c5", "extra": {}}}','{"train": {"train": {"learning_rate": 0.01, "steps": 100}}, "probe": {"probe": {"learning_rate": 0.001, "steps": 100}}, "export": {"export": {"learning_rate": 0.001, "steps": 100}}, "quantize": {"quantize": {"learning_rate": 0.001, "steps": 100}}, "verify": {"verify": {"learning_rate": 0.001, "steps": 100}}, "evaluate": {"evaluate": {"learning_rate": 0.001, "steps": 100}}}','{"train": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "probe": {"adapters/baseline_lora/0/adapter_model.safetensors": "ad5b825ac31d69c17d192ee23579a25730af0be2707db5a35ba20fb5892bcf09"}, "export": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "quantize": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}, "verify": {"data/train.jsonl": "116f54c41d0405dbb10e7b04ebc31e262a5b8c85c1233fcf36eaee344d91ae58"}, "evaluate": {"data/test.jsonl": "7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732", "gguf/baseline_lora/0/model.gguf": "b49f36bc2d2a7c415fb606bf0896479e2de2481926ee66547491d4ebf8282508"}}','abc123',0,'Q: {prompt} A:','llama_cpp','0.3.36','cpu',1,'7e29e3353587c806fecc6838bdad5b925f8ca9a6e4535e9a16a3db8b6dfdd732',1,'{"prompt": "p", "hf": "a", "merged_gguf": "b"}','merged');
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
INSERT INTO "sample" VALUES(13,4,'aqi-000000','aqi','test','PM2.5 is 0','0','0',0.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(14,4,'aqi-000001','aqi','test','PM2.5 is 1','1','1',1.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(15,4,'aqi-000002','aqi','test','PM2.5 is 2','2','62',62.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(16,4,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
INSERT INTO "sample" VALUES(17,3,'aqi-000000','aqi','test','PM2.5 is 0','0','two
lines ''quoted'', µ 漢字',NULL,1,NULL,40,NULL);
INSERT INTO "sample" VALUES(18,3,'aqi-000001','aqi','test','PM2.5 is 1','1','1',1.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(19,3,'aqi-000002','aqi','test','PM2.5 is 2','2','2',2.0,1,0.0,40,9);
INSERT INTO "sample" VALUES(20,3,'aqi-000003','aqi','test','PM2.5 is 3','3','63',63.0,0,60.0,40,9);
CREATE TABLE "speed" (
	id INTEGER NOT NULL, 
	run_id INTEGER NOT NULL, 
	arm TEXT NOT NULL, 
	phase TEXT NOT NULL, 
	repetition BIGINT NOT NULL, 
	tokens BIGINT, 
	nanoseconds BIGINT, 
	CONSTRAINT pk_speed PRIMARY KEY (id), 
	CONSTRAINT ck_speed_named CHECK (arm <> ''), 
	CONSTRAINT uq_speed_run_id_arm_phase_repetition UNIQUE (run_id, arm, phase, repetition), 
	CONSTRAINT ck_speed_nanoseconds_count CHECK (nanoseconds BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_speed_repetition_count CHECK (repetition BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT ck_speed_tokens_count CHECK (tokens BETWEEN 0 AND 9223372036854775807), 
	CONSTRAINT fk_speed_run_id FOREIGN KEY(run_id) REFERENCES run (id) ON DELETE CASCADE, 
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
INSERT INTO "speed" VALUES(14,4,'baseline_lora','decode',0,200,3000000000);
INSERT INTO "speed" VALUES(15,4,'baseline_lora','decode',1,400,3000000000);
INSERT INTO "speed" VALUES(16,4,'base','decode',0,200,2500000000);
INSERT INTO "speed" VALUES(17,4,'base','decode',1,400,2500000000);
INSERT INTO "speed" VALUES(18,4,'baseline_lora','load',0,NULL,1000000000);
INSERT INTO "speed" VALUES(19,3,'pure_grit','decode',0,200,3000000000);
INSERT INTO "speed" VALUES(20,3,'pure_grit','decode',1,400,3000000000);
INSERT INTO "speed" VALUES(21,3,'base','decode',0,200,2500000000);
INSERT INTO "speed" VALUES(22,3,'base','decode',1,400,2500000000);
INSERT INTO "speed" VALUES(23,3,'pure_grit','load',0,NULL,1000000000);
INSERT INTO "speed" VALUES(24,3,'pure_grit','ttft',0,1,5000000);
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
INSERT INTO "verification" VALUES(1,4,'llama_cpp','0.3.36','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,NULL,NULL);
INSERT INTO "verification" VALUES(2,4,'llama_cpp','0.3.36','adapter',20,1.0,1.0,0.95,0.95,1,'prompt 3: token 2 | differs
Likely cause: scale','1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e','ae1eae1d76e5b7c865c4122ce366a08025842566d2d96c75cc13e6353a73db0d',NULL,NULL);
INSERT INTO "verification" VALUES(3,4,'ollama','0.32.0','merged',20,1.0,1.0,1.0,NULL,NULL,NULL,'1cb1b7e0f8b96cee3445e317b8064d8805bf35c7dc7de82cddcb9f78d4c95e0e',NULL,'sha256:abc','87b04e58961f9a99d853d4046a0b5b793e7c3e4bbd21f5aca8fb17c20cdb1d8b');
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
COMMIT;
